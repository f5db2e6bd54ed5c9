"""DDP under Ray Train: two real workers, gloo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.distill import distill
from jobs.train_student import train_student
from pipeline.core.errors import CacheError, ResourceError
from tests.errors import raises
from tests.jobs.conftest import Tree, config_of, files_below
from tests.pipeline.student.runs import metrics

pytestmark = pytest.mark.ray
TWO = {"address": "local", "num_workers": 2}


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_distill_builds_then_trains_with_two_workers_and_a_second_call_does_nothing(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLROOM_LOG", "json")
    config = config_of(tree(ray=TWO, loss=[{"name": "ce"}, {"name": "dist"}, {"name": "nd"}]))
    summary = distill(config)
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert sorted(item["rank"] for item in events if item["event"] == "rank") == [0, 1]
    (built, trained) = (item for item in events if item["event"] == "node")
    assert (built["parts"], trained["ranks"]) == (12, 2)
    assert built["node"] == trained["node"]
    assert [item["step"] for item in events if item["event"] == "step"] == [3, 7]
    assert summary["steps"] == 8
    assert 0 <= summary["top1"] <= 1
    assert [record["step"] for record in metrics(tmp_path / "run")] == list(range(8))
    before = files_below(tmp_path)
    assert distill(config) == summary
    assert files_below(tmp_path) == before


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_workers_error_reaches_the_driver_as_its_one_message(tree: Tree, built_cache: Path, tmp_path: Path) -> None:
    part = next((built_cache / "parts" / "digits-01").glob("v0000*"))
    data = bytearray(part.read_bytes())
    data[200] ^= 1
    part.write_bytes(bytes(data))
    training = config_of(tree(ray={**TWO, "max_failures": 1}, data={"cache": str(built_cache)}))
    with raises("cache.changed-file", CacheError):
        train_student(training)
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_more_workers_than_fit_on_the_cluster_are_refused(tree: Tree) -> None:
    config = config_of(
        tree(ray={"address": "local", "num_workers": 9}, teacher={"mode": "none"}, loss=[{"name": "ce"}])
    )
    with raises("ray.too-few-resources", ResourceError) as caught:
        train_student(config)
    assert (caught.value.got, caught.value.expected) == ("1 node with 2 CPU: room for 2", "9 x (1 CPU)")


def test_training_without_a_cache_indexes_the_shards(tree: Tree, tmp_path: Path) -> None:
    summary = train_student(config_of(tree(teacher={"mode": "online"})))
    assert summary["steps"] == 8
    assert len(list((tmp_path / "run" / "index").iterdir())) == 4
