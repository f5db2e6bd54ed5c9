"""Sums of a build by node, against numbers computed by hand."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.observability.build_observer import BuildObserver, BuiltPart
from jobs.observability.task_observer import AttemptStats
from pipeline.cache.build.part import PartTask
from pipeline.core.errors import ShardError, TransientStorageError
from schemas.cache_format import ByteRange, Commit, FileRef, Statistics, ViewBlock, ViewRange
from tests.jobs.conftest import JsonLog, Tree, config_of


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def built(*, images: int, views: int, size_bytes: int, busy_s: float) -> BuiltPart:
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
    return BuiltPart(commit, busy_s)


@pytest.fixture
def events(tree: Tree, json_log: JsonLog) -> list[dict[str, Any]]:
    """The log of three parts on two nodes; the first node built two of them at once."""
    config = config_of(tree(ray={"address": "none", "cpus_per_task": 4, "gpus_per_task": 0.5}))
    first, second, third = (
        PartTask(config, f"s3://bucket/train-{number}.tar", ViewBlock(start=0, stop=2)) for number in (1, 2, 3)
    )
    clock = Clock()
    observer = BuildObserver(config, [first, second, third], num_shards=5, clock=clock)
    clock.now_s = 1900
    observer.done(first, built(images=100, views=2, size_bytes=10, busy_s=600), AttemptStats("left", 800), attempt=1)
    observer.retried(
        second, TransientStorageError("slow down"), AttemptStats(None, 360), attempt=1, kind="storage", pause_s=1
    )
    clock.now_s = 2000
    observer.done(second, built(images=50, views=2, size_bytes=20, busy_s=250), AttemptStats("left", 1000), attempt=2)
    clock.now_s = 2800
    observer.done(third, built(images=10, views=1, size_bytes=5, busy_s=900), AttemptStats("right", 1800), attempt=1)
    observer.failed(third, ShardError("cut"), AttemptStats("right", 540), attempt=1)
    observer.log_summary()
    return json_log()


def test_a_node_is_counted_from_the_start_of_its_first_part_to_the_end_of_its_last(
    events: list[dict[str, Any]],
) -> None:
    left, right = (item for item in events if item["event"] == "node")
    # Parts from 1100 to 1900 and from 1000 to 2000: 1000 s; the teacher took 850 of 1800 s.
    assert (left["parts"], left["images"], left["size_bytes"]) == (2, 300, 30)
    assert left["images_per_s"] == 0.3
    assert left["teacher_busy"] == round(850 / 1800, 6)
    assert left["hours"] == round(1000 / 3600, 6)
    assert (right["images"], right["hours"], right["teacher_busy"]) == (10, 0.5, 0.5)


def test_hours_are_those_of_nodes_and_reservations(events: list[dict[str, Any]]) -> None:
    (summary,) = (item for item in events if item["event"] == "summary")
    assert (summary["nodes"], summary["parts"], summary["images"]) == (2, 3, 310)
    assert (summary["retried"], summary["failed"]) == (1, 1)
    assert summary["node_hours"] == round((1000 + 1800) / 3600, 6)
    # One hour of parts and a quarter of an hour of failed attempts, of four CPUs and half a GPU each.
    assert summary["lost_task_hours"] == 0.25
    assert (summary["cpu_hours"], summary["gpu_hours"]) == (5.0, 0.625)
    assert summary["message"].endswith("5 CPU-hours and 0.625 GPU-hours, 20.0% of them in attempts that failed")


def test_an_attempt_is_logged_with_its_shard_and_its_outcome(events: list[dict[str, Any]]) -> None:
    attempts = [
        (item["event"], item["shard"], item["part"], item["attempt"], item.get("node"))
        for item in events
        if "part" in item
    ]
    assert attempts == [
        ("done", "train-1", "v0000-0001", 1, "left"),
        ("retried", "train-2", "v0000-0001", 1, None),
        ("done", "train-2", "v0000-0001", 2, "left"),
        ("done", "train-3", "v0000-0001", 1, "right"),
        ("failed", "train-3", "v0000-0001", 1, "right"),
    ]
    (retried,) = (item for item in events if item["event"] == "retried")
    assert (retried["kind"], retried["pause_s"]) == ("storage", 1)
    assert "slow down" in retried["error"]


def test_a_build_without_a_finished_part_has_hours_too(tree: Tree, json_log: JsonLog) -> None:
    task = PartTask(config_of(tree()), "s3://bucket/train-1.tar", ViewBlock(start=0, stop=2))
    observer = BuildObserver(task.config, [task], num_shards=1)
    observer.failed(task, ShardError("cut"), AttemptStats("left", 1800), attempt=1)
    observer.log_summary()
    _, summary = json_log()
    assert (summary["parts"], summary["cpu_hours"], summary["lost_task_hours"], summary["hours"]) == (0, 0.5, 0.5, 0)
    assert summary["message"].endswith("100.0% of them in attempts that failed")


def test_a_build_with_nothing_to_do_logs_no_summary(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    BuildObserver(config_of(tree()), [], num_shards=5).log_summary()
    assert capsys.readouterr().err == ""


def test_secrets_in_a_url_are_not_logged(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    task = PartTask(config_of(tree()), "https://user:hunter2@host/train-1.tar?sig=hunter2", ViewBlock(start=0, stop=1))
    BuildObserver(task.config, [task], num_shards=1).failed(task, ShardError("cut"), AttemptStats("left", 1), attempt=1)
    assert "hunter2" not in capsys.readouterr().err
