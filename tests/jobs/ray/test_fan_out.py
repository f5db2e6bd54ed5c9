"""Tasks: a bounded number in flight, counted retries, one error."""

from __future__ import annotations

import platform
import time
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path
from typing import cast

import psutil
import pytest
import ray

from jobs.ray.fan_out import fan_out
from pipeline.core.errors import (
    CacheError,
    ResourceError,
    ShardError,
    StillroomError,
    StorageError,
    TransientStorageError,
)
from schemas.config import RayConfig
from tests.errors import raises
from tests.jobs import NUM_CPUS
from tests.jobs.conftest import JsonLog
from tests.jobs.ray.task_work import (
    alternate,
    always_fail,
    die_once,
    fail_by_kind,
    fail_once,
    hang_at_1,
    lose_the_gpu_once,
    odd_shards_are_bad,
    process_id,
    square,
    task_name,
)

pytestmark = pytest.mark.ray
RAY = RayConfig(max_retries=2)
LOOP = RayConfig(address="none")


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.ray.task_scheduler.BACKOFF_S", 0.05)


def num_attempts(folder: Path) -> int:
    return len(list(folder.iterdir()))


def items(limit: int, consumed: list[int]) -> Iterator[int]:
    for number in range(limit):
        consumed.append(number)
        yield number


def collect(results: Iterator[tuple[int, int]], done: list[int]) -> None:
    """Appends each item to ``done``, also before an error."""
    for item, _ in results:
        done.append(item)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_lost_its_gpu_exits_and_another_worker_takes_its_item(tmp_path: Path) -> None:
    folder = tmp_path / "attempts"
    folder.mkdir()
    ((_, worker),) = fan_out(partial(lose_the_gpu_once, folder), [1], RAY, what="a task")
    lost = int((tmp_path / "lost").read_text())
    assert worker != lost
    assert num_attempts(folder) == 2
    assert not psutil.pid_exists(lost) or psutil.Process(lost).status() == psutil.STATUS_ZOMBIE


@pytest.mark.usefixtures("ray_cluster")
def test_every_item_is_returned_once_with_its_result() -> None:
    results = dict(fan_out(square, range(50), RAY, what="a task"))
    assert results == {number: number * number for number in range(50)}


def test_without_ray_the_work_is_a_plain_loop_in_order() -> None:
    assert list(fan_out(square, [3, 1, 2], LOOP, what="a task")) == [(3, 9), (1, 1), (2, 4)]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("fault", [fail_once, die_once], ids=["storage fails", "worker dies"])
def test_a_transient_fault_costs_one_more_attempt_of_one_item(fault, tmp_path: Path) -> None:
    results = dict(fan_out(partial(fault, tmp_path), range(4), RAY, what="a task"))
    assert results == {number: number for number in range(4)}
    assert num_attempts(tmp_path) == 5


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("error", "expected"), [(TransientStorageError, 1 + RAY.max_retries), (ShardError, 1)], ids=["transient", "input"]
)
def test_a_permanent_fault_fails_after_the_counted_retries_and_bad_input_without_one(
    error: type[StillroomError], expected: int, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        list(fan_out(partial(always_fail, tmp_path, error), [1], RAY, what="a task"))
    assert caught.value.what == "nothing helps"
    assert num_attempts(tmp_path) == expected


@pytest.mark.usefixtures("ray_cluster")
def test_a_bug_in_the_work_keeps_its_traceback_and_is_not_retried(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="always_fail"):
        list(fan_out(partial(always_fail, tmp_path, ZeroDivisionError), [1], RAY, what="a task"))
    assert num_attempts(tmp_path) == 1


@pytest.mark.usefixtures("ray_cluster")
def test_retries_are_counted_by_kind_of_fault_and_each_attempt_is_logged(tmp_path: Path, json_log: JsonLog) -> None:
    name = f"shard of {tmp_path.name}"
    tasks = fan_out(partial(alternate, tmp_path), [1], RAY, what="a task", name=lambda _: name)
    assert list(tasks) == [(1, 1)]
    assert num_attempts(tmp_path) == 5
    events = json_log()
    assert "retried: 2 after WorkerCrashedError, 2 after a failure of storage" in events.pop()["message"]
    died, failed = ("retried", "WorkerCrashedError"), ("retried", "a failure of storage")
    assert [(item["event"], item.get("kind")) for item in events] == [died, failed, died, failed, ("done", None)]
    assert [item["attempt"] for item in events] == [1, 2, 3, 4, 5]
    assert {item["item"] for item in events} == {name}
    # Also of workers that died, since the cluster has one node.
    node = f"{platform.node()}:{ray.nodes()[0]['NodeID'][:8]}"
    assert {item["node"] for item in events} == {node}
    assert all(item["seconds"] >= 0 for item in events)
    # Workers log their attempts too, as plain lines, since the cluster started without that variable.
    lines = [text.partition(f"a task: {name}: attempt ")[2] for text in lines_of_workers()]
    assert sorted(line for line in lines if "began" in line) == [f"{number} began on {node}" for number in range(1, 6)]
    ended = sorted((line[0], line.rpartition(f" on {node}, ")[2]) for line in lines if "ended" in line)
    failed_once = "failed: the store had a bad moment"
    assert ended == [("2", failed_once), ("4", failed_once), ("5", "done")]


def lines_of_workers() -> list[str]:
    folder = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    return [line for log in folder.glob("worker-*.err") for line in log.read_text().splitlines()]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("config", [LOOP, RAY], ids=["loop", "ray"])
def test_bad_shards_are_reported_together_when_the_others_are_done(config: RayConfig, tmp_path: Path) -> None:
    done: list[int] = []
    with raises("ray.several-failures", ShardError, exit_code=2) as caught:
        collect(fan_out(partial(odd_shards_are_bad, tmp_path), range(8), config, what="a task"), done)
    assert sorted(done) == [0, 2, 4, 6]
    assert num_attempts(tmp_path) == 8
    got = str(caught.value.got)
    assert [got.count(text) for text in ("this shard is cut", "shard 1", "shard 3")] == [2, 1, 1]


@pytest.mark.parametrize("kind", [ShardError, CacheError, StorageError])
def test_only_a_failure_that_concerns_all_items_ends_the_work_at_once(kind: type[StillroomError]) -> None:
    done: list[int] = []
    with pytest.raises(kind) as caught:
        collect(fan_out(partial(fail_by_kind, {2: kind}), range(5), LOOP, what="a task"), done)
    assert caught.value.what == "item 2 failed"
    assert done == ([0, 1, 3, 4] if kind is ShardError else [0, 1])


def test_a_failure_that_may_pass_decides_the_exit_code() -> None:
    errors: dict[int, type[StillroomError]] = {1: ShardError, 2: TransientStorageError}
    with raises("ray.several-failures", TransientStorageError, exit_code=1) as caught:
        list(fan_out(partial(fail_by_kind, errors), range(4), LOOP, what="a task"))
    assert "item 1 failed" in str(caught.value)
    assert "item 2 failed" in str(caught.value)


def test_too_many_bad_shards_end_the_work() -> None:
    consumed: list[int] = []
    errors: dict[int, type[StillroomError]] = dict.fromkeys(range(100), ShardError)
    with raises("ray.several-failures", ShardError) as caught:
        list(fan_out(partial(fail_by_kind, errors), items(100, consumed), LOOP, what="a task"))
    assert str(caught.value.got).count("failed") == len(consumed) == 17


@pytest.mark.usefixtures("ray_cluster")
def test_items_are_consumed_as_tasks_start() -> None:
    consumed: list[int] = []
    results = cast("Generator[object]", fan_out(square, items(1000, consumed), RAY, what="a task"))
    next(results)
    assert len(consumed) <= 2 * NUM_CPUS
    results.close()


@pytest.mark.usefixtures("ray_cluster")
def test_tasks_that_no_node_could_run_are_refused_at_once() -> None:
    with raises("ray.too-few-resources", ResourceError, exit_code=2) as caught:
        list(fan_out(square, [1], RayConfig(cpus_per_task=64), what="a cache task"))
    assert (caught.value.got, caught.value.expected) == (f"1 node with {NUM_CPUS} CPU", "64 CPU")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_part_that_hangs_is_ended_retried_and_named_when_the_others_are_done(
    tmp_path: Path, json_log: JsonLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.ray.task_scheduler.SILENT_AFTER_S", 0.5)
    config = RayConfig(max_retries=1, part_timeout_s=3)
    done: list[int] = []
    with raises("ray.part-timeout", StorageError, where="part 1", exit_code=1):
        collect(fan_out(partial(hang_at_1, tmp_path), range(6), config, what="a task", name="part {}".format), done)
    assert sorted(done) == [0, 2, 3, 4, 5]
    assert len(list(tmp_path.glob("1-*"))) == 2
    events = json_log()
    assert [(item["item"], item["kind"]) for item in events if item["event"] == "retried"] == [("part 1", "a timeout")]
    silent = [item for item in events if item["event"] == "silent" and item["item"] == "part 1"]
    assert silent
    assert all(item["silent_s"] >= 0.5 for item in silent)
    assert any("Timeout (0:00:03)!" in line for line in lines_of_workers())


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_part_that_is_done_in_time_does_not_end_its_worker() -> None:
    config = RayConfig(part_timeout_s=1)
    before = {pid for _, pid in fan_out(process_id, range(8), config, what="a task")}
    time.sleep(1.2)
    assert before & {pid for _, pid in fan_out(process_id, range(8), config, what="a task")}


def test_a_time_limit_needs_ray() -> None:
    with pytest.raises(ValueError, match="part_timeout_s"):
        RayConfig(address="none", part_timeout_s=10)


@pytest.mark.usefixtures("ray_cluster")
def test_tasks_are_named_after_their_parts_up_to_a_limit_since_ray_keeps_metrics_of_every_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jobs.ray.task_scheduler.MAX_NAMED_TASKS", 3)
    results = dict(fan_out(task_name, range(6), RAY, what="cache", name="part {}".format))
    assert [results[number] for number in range(3)] == [f"cache: part {number}" for number in range(3)]
    assert {results[number] for number in range(3, 6)} == {"_call"}
