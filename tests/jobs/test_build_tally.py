"""Sums of a build by node, against numbers by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jobs.build_tally import BuildTally, Built
from jobs.tally import Spent
from pipeline.cache.build import PartTask
from pipeline.errors import PassingStorageError, ShardError
from schemas.manifest import ByteRange, Commit, FileRef, Statistics, ViewBlock, ViewRange
from tests.jobs.conftest import Tree, config_of


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def built(*, images: int, views: int, size_bytes: int, busy_s: float) -> Built:
    file = FileRef(path="a", sha256="b", size_bytes=size_bytes)
    ranges = [ViewRange(view=view, offset=0, size_bytes=1, rows=images, digest="") for view in range(views)]
    commit = Commit(
        fingerprint="",
        shard_id="a",
        shard_size_bytes=1,
        block=ViewBlock(start=0, stop=views),
        part=file,
        index=file,
        means=None,
        num_ok=images,
        read=images,
        written=images,
        skipped={},
        views=tuple(ranges),
        footer=ByteRange(offset=0, size_bytes=1, digest=""),
        statistics=Statistics(),
        environment={},
    )
    return Built(commit, busy_s)


@pytest.fixture
def told(tree: Tree, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is told of three parts on two nodes, of which the first built two at once."""
    monkeypatch.setenv("STILLROOM_LOG", "json")
    config = config_of(tree(ray={"address": "none", "cpus_per_task": 4, "gpus_per_task": 0.5}))
    one, two, three = (
        PartTask(config, f"s3://bucket/train-{number}.tar", ViewBlock(start=0, stop=2)) for number in (1, 2, 3)
    )
    clock = Clock()
    tally = BuildTally(config, [one, two, three], num_shards=5, clock=clock)
    clock.now_s = 1900
    tally.done(one, built(images=100, views=2, size_bytes=10, busy_s=600), Spent("left", 800), attempt=1)
    tally.retried(two, PassingStorageError("slow down"), Spent(None, 360), attempt=1, kind="storage", pause_s=1)
    clock.now_s = 2000
    tally.done(two, built(images=50, views=2, size_bytes=20, busy_s=250), Spent("left", 1000), attempt=2)
    clock.now_s = 2800
    tally.done(three, built(images=10, views=1, size_bytes=5, busy_s=900), Spent("right", 1800), attempt=1)
    tally.failed(three, ShardError("cut"), Spent("right", 540), attempt=1)
    tally.sum_up()
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_node_is_there_from_the_start_of_its_first_part_to_the_end_of_its_last(told: list[dict[str, Any]]) -> None:
    left, right = (item for item in told if item["event"] == "node")
    # Parts from 1100 to 1900 and from 1000 to 2000: 1000 s, in which two parts took 1800 s, 850 of them asking.
    assert (left["parts"], left["images"], left["size_bytes"]) == (2, 300, 30)
    assert left["images_per_s"] == 0.3
    assert left["teacher_busy"] == round(850 / 1800, 6)
    assert left["hours"] == round(1000 / 3600, 6)
    assert (right["images"], right["hours"], right["teacher_busy"]) == (10, 0.5, 0.5)


def test_the_hours_are_those_that_nodes_and_reservations_cost(told: list[dict[str, Any]]) -> None:
    (summary,) = (item for item in told if item["event"] == "summary")
    assert (summary["nodes"], summary["parts"], summary["images"]) == (2, 3, 310)
    assert (summary["retried"], summary["failed"]) == (1, 1)
    assert summary["node_hours"] == round((1000 + 1800) / 3600, 6)
    # One hour of parts in all, and a quarter of one for nothing, of four CPUs and half a GPU each.
    assert summary["lost_task_hours"] == 0.25
    assert (summary["cpu_hours"], summary["gpu_hours"]) == (5.0, 0.625)
    assert summary["message"].endswith("5 CPU-hours and 0.625 GPU-hours, 20.0% of them in attempts that failed")


def test_an_attempt_is_told_with_its_shard_and_what_became_of_it(told: list[dict[str, Any]]) -> None:
    attempts = [
        (item["event"], item["shard"], item["part"], item["attempt"], item.get("node"))
        for item in told
        if "part" in item
    ]
    assert attempts == [
        ("done", "train-1", "v0000-0001", 1, "left"),
        ("retried", "train-2", "v0000-0001", 1, None),
        ("done", "train-2", "v0000-0001", 2, "left"),
        ("done", "train-3", "v0000-0001", 1, "right"),
        ("failed", "train-3", "v0000-0001", 1, "right"),
    ]
    (retried,) = (item for item in told if item["event"] == "retried")
    assert (retried["kind"], retried["pause_s"]) == ("storage", 1)
    assert "slow down" in retried["error"]


def test_a_build_of_which_nothing_came_cost_hours_all_the_same(
    tree: Tree, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = PartTask(config_of(tree()), "s3://bucket/train-1.tar", ViewBlock(start=0, stop=2))
    tally = BuildTally(task.config, [task], num_shards=1)
    tally.failed(task, ShardError("cut"), Spent("left", 1800), attempt=1)
    monkeypatch.setenv("STILLROOM_LOG", "json")
    capsys.readouterr()
    tally.sum_up()
    (summary,) = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (summary["parts"], summary["cpu_hours"], summary["lost_task_hours"], summary["hours"]) == (0, 0.5, 0.5, 0)
    assert summary["message"].endswith("100.0% of them in attempts that failed")


def test_a_build_with_nothing_to_do_sums_nothing_up(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    BuildTally(config_of(tree()), [], num_shards=5).sum_up()
    assert capsys.readouterr().err == ""


def test_keys_in_a_url_are_not_told(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    task = PartTask(config_of(tree()), "https://user:hunter2@host/train-1.tar?sig=hunter2", ViewBlock(start=0, stop=1))
    BuildTally(task.config, [task], num_shards=1).failed(task, ShardError("cut"), Spent("left", 1), attempt=1)
    assert "hunter2" not in capsys.readouterr().err
