"""Commands with masks and boxes: shards are indexed, and what needs a network is refused by one code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import index_shards
from jobs.recipes.document import load_recipe
from jobs.recipes.schedule import describe_plan
from pipeline.core.errors import ConfigError
from pipeline.shards.index import STATUSES
from pipeline.shards.publish import read_index
from pipeline.shards.writer import pack_shards
from schemas.config import Config
from tests.errors import raises
from tests.jobs.test_missing_keys import COMMANDS, RECIPE, document
from tests.pipeline.tasks.test_dense import CASES

DENSE = {"kind": "scale_crop", "size": 16}


@pytest.mark.parametrize("mode", ["cache", "online", "none"])
@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "shards index"])
@pytest.mark.parametrize("task", CASES)
def test_commands_that_need_a_network_are_refused(task: str, command: str, mode: str) -> None:
    tree = {**document(mode), "views": DENSE}
    tree["data"]["task"] = task
    with raises("config.task-without-networks", ConfigError, got=task):
        COMMANDS[command](Config.model_validate(tree), "")


@pytest.mark.parametrize("task", CASES)
def test_a_recipe_is_refused_before_its_first_stage(task: str, tmp_path: Path) -> None:
    common = {**RECIPE["common"], "views": DENSE, "data": {**RECIPE["common"]["data"], "task": task}}
    source = tmp_path / "recipe.yaml"
    source.write_text(yaml.safe_dump({**RECIPE, "common": common, "out": str(tmp_path / "out")}))
    with raises("config.task-without-networks", ConfigError):
        describe_plan(load_recipe(str(source), []))


@pytest.mark.parametrize("task", CASES)
def test_shards_are_indexed_and_bad_targets_stop_the_index_or_are_counted(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = CASES[task]
    usable = {name: members for name, (members, status) in samples.items() if status in ("ok", "bad_target")}
    members = ((name.replace(" ", "-"), members) for name, members in usable.items())
    (url,) = pack_shards(members, str(tmp_path / "scenes-%d.tar"), shard_size=100)
    source, index_url = tmp_path / "config.yaml", tmp_path / "index"
    data: dict[str, Any] = {"task": task, "num_classes": 3, "shards": url, "index": str(index_url)}
    source.write_text(yaml.safe_dump({"data": data, "ray": {"address": "none"}}))
    with raises("shard.bad-samples"):
        index_shards.main(str(source), [])
    assert not index_url.exists()
    index_shards.main(str(source), ["data.bad_samples=skip", "data.max_bad_share=0.9"])
    index = read_index(str(index_url / "scenes-0.parquet"))
    statuses = [samples[name][1] for name in usable]
    assert [STATUSES[status] for status in index.status] == statuses
    log = capsys.readouterr().err
    assert f"{statuses.count('bad_target')} bad_target samples (" in log
    assert f"1 of {statuses.count('ok')} images have none" in log
