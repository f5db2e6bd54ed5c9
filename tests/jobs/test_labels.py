"""Missing labels are an error before any work if the shards show it, else a warning with counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.build_cache import build_cache
from jobs.cli import app
from jobs.index_shards import index_shards
from jobs.plan_cache import describe, report
from pipeline.cache.ops.inspect import inspect_cache
from pipeline.core.errors import ShardError, StillroomError
from pipeline.shards.writer import Members, pack_shards
from schemas.config import Config
from tests.errors import raises
from tests.jobs.conftest import Tree, config_of, files_below
from tests.pipeline.caches import cache_section, digit_samples

Shards = Callable[..., list[str]]
NUM_SAMPLES, SHARD_SIZE = 24, 8


@pytest.fixture
def shards_of(tmp_path: Path) -> Shards:
    """``shards_of(member_of)``: three shards of eight digits. ``member_of(row, label)`` returns their label members."""

    def pack(member_of: Callable[[int, str], Members]) -> list[str]:
        samples = (
            (key, {"png": members["png"], **member_of(row, members["cls"].decode())})
            for row, (key, members) in enumerate(digit_samples(NUM_SAMPLES))
        )
        return pack_shards(samples, f"{tmp_path}/s-%02d.tar", shard_size=SHARD_SIZE)

    return pack


def in_json(_: int, label: str) -> Members:
    return {"json": json.dumps({"label": int(label)}).encode()}


def in_txt(_: int, label: str) -> Members:
    return {"txt": label.encode(), "json": b"{}"}


def in_the_last_shard(row: int, label: str) -> Members:
    return {"cls": label.encode()} if row >= NUM_SAMPLES - SHARD_SIZE else {}


def unlabelled(tree: Tree, shards: list[str], **data: object) -> Config:
    return config_of(tree(data={"shards": shards, **data}, cache={"class_means": "none"}))


def not_found(*members: str) -> AbstractContextManager[pytest.ExceptionInfo[StillroomError]]:
    counts = ", ".join(f"{NUM_SAMPLES} {name}" for name in members)
    got = f"labels: 0 of {NUM_SAMPLES}; members seen: {counts}"
    return raises("data.label-not-found", ShardError, exit_code=2, got=got)


@pytest.mark.parametrize("work", [build_cache, lambda config: report(config, measured=False)], ids=["build", "plan"])
def test_a_wrong_label_member_stops_a_build_and_its_plan_before_the_teacher(
    work: Callable[[Config], object], tree: Tree, shards_of: Shards, tmp_path: Path
) -> None:
    config = unlabelled(tree, shards_of(in_json))
    before = files_below(tmp_path)
    with not_found("json", "png") as caught:
        work(config)
    assert "set data.label=json:label, or " in str(caught.value.next_step)
    assert "data.label=null" in str(caught.value.next_step)
    assert files_below(tmp_path) == before


def test_a_member_with_class_indexes_is_named(tree: Tree, shards_of: Shards) -> None:
    config = unlabelled(tree, shards_of(in_txt))
    with not_found("json", "png", "txt") as caught:
        build_cache(config)
    assert "set data.label=txt, or " in str(caught.value.next_step)
    build_cache(unlabelled(tree, [*(config.data.shards or ())], label="txt"))


def test_an_index_for_online_training_is_refused_too(tree: Tree, shards_of: Shards, tmp_path: Path) -> None:
    config = unlabelled(tree, shards_of(in_json))
    with not_found("json", "png"):
        index_shards(config, str(tmp_path / "index"))
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("label", ["cls", None])
def test_an_index_without_images_is_refused_with_the_member_that_has_them(
    tree: Tree, shards_of: Shards, tmp_path: Path, label: str | None
) -> None:
    config = unlabelled(tree, shards_of(in_json), image="input.jpg", label=label)
    with raises("shard.no-samples", ShardError, next_step="set data.image=png"):
        index_shards(config, str(tmp_path / "index"))
    assert not (tmp_path / "index").exists()


def test_an_index_of_partly_labelled_shards_is_written_with_a_count(
    tree: Tree, shards_of: Shards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = unlabelled(tree, shards_of(in_the_last_shard))
    assert index_shards(config, str(tmp_path / "index")) == NUM_SAMPLES
    assert "16 of 24 images have none (data.label is cls)" in caplog.text


def test_data_without_labels_on_purpose_gives_no_warning(
    tree: Tree, shards_of: Shards, caplog: pytest.LogCaptureFixture
) -> None:
    config = unlabelled(tree, shards_of(in_json), label=None)
    assert "none (data.label is null)" in describe(report(config, measured=False))
    build_cache(config)
    assert "labels" not in caplog.text


def test_labels_that_may_be_missing_are_counted_by_plan_build_and_inspect(
    tree: Tree, shards_of: Shards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = unlabelled(tree, shards_of(in_json), missing_labels="ignore")
    labels = "0 of 24; members seen: 24 json, 24 png"
    plan = report(config, measured=False)
    assert f"labels          {labels}" in describe(plan)
    assert sum(labels in warning for warning in plan.warnings) == 1
    build_cache(config)
    # Of a finished cache the members of the first shard are read.
    labels = f"0 of 24; members seen: {SHARD_SIZE} json, {SHARD_SIZE} png"
    assert labels in caplog.text
    # The rules of a finished cache cannot change: data.label would not help.
    command = f"run: stillroom cache relabel {tmp_path / 'cache'} --label json:label"
    assert command in caplog.text
    for arguments in ([], ["--json"]):
        result = CliRunner().invoke(app, ["cache", "inspect", str(tmp_path / "cache"), *arguments])
        assert result.exit_code == 0
        assert command in result.stdout
        assert "data.label=" not in result.stdout
        assert labels in result.stdout
        assert "warning" in result.stdout


def test_images_in_no_domain_are_counted_by_plan_build_index_and_inspect(
    tree: Tree, shards_of: Shards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = unlabelled(tree, shards_of(lambda row, label: {"cls": label.encode(), **in_json(row, label)}))
    for domain, num_missing in (("json:place", NUM_SAMPLES), ({"s-00": "north", "s-01": "south"}, SHARD_SIZE)):
        cache = tmp_path / f"without-{num_missing}"
        data = config.data.model_copy(update={"domain": domain})
        named = config.model_copy(
            update={"data": data, "cache": cache_section(config).model_copy(update={"url": str(cache)})}
        )
        count = f"domains: {num_missing} of {NUM_SAMPLES} images are in none"
        assert sum(count in warning for warning in report(named, measured=False).warnings) == 1
        build_cache(named)
        assert caplog.text.count(count) == 1
        index_shards(named, str(tmp_path / f"index-{num_missing}"))
        assert caplog.text.count(count) == 2
        assert sum(count in warning for warning in inspect_cache(str(cache)).warnings) == 1
    without = report(config, measured=False)
    assert not [warning for warning in without.warnings if "domain" in warning]


def test_partly_labelled_data_is_built_with_a_count(
    tree: Tree, shards_of: Shards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build_cache(unlabelled(tree, shards_of(in_the_last_shard)))
    assert "labels: 16 of 24 images have none (data.label is cls)" in caplog.text
    result = CliRunner().invoke(app, ["cache", "inspect", str(tmp_path / "cache"), "--json"])
    assert json.loads(result.stdout)["labels"] == "8 of 24"


def test_a_cache_of_parts_without_labels_can_be_extended(tree: Tree, shards_of: Shards) -> None:
    """Its header fixes its reading rules."""
    shards = shards_of(in_json)
    build_cache(unlabelled(tree, shards, missing_labels="ignore"))
    later = unlabelled(tree, shards)
    later = later.model_copy(update={"views": later.views.model_copy(update={"count": 4})})
    assert build_cache(later).num_views == 4


def test_an_inspection_without_the_shards_names_no_members(tree: Tree, shards_of: Shards, tmp_path: Path) -> None:
    shards = shards_of(in_json)
    build_cache(unlabelled(tree, shards, missing_labels="ignore"))
    for shard in shards:
        Path(shard).unlink()
    result = CliRunner().invoke(app, ["cache", "inspect", str(tmp_path / "cache"), "--json"])
    assert json.loads(result.stdout)["labels"] == "0 of 24"
