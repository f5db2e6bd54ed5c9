"""Tasks: a bounded number in flight, counted retries, one error."""

from __future__ import annotations

import ctypes
import os
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
    LostGpuError,
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

pytestmark = pytest.mark.ray
RAY = RayConfig(max_retries=2)


def _square(number: int) -> int:
    return number * number


def _attempt(folder: Path, number: int) -> int:
    """Writes a file for every attempt and returns their number, this one included."""
    (folder / f"{number}-{len(list(folder.glob(f'{number}-*')))}").touch()
    return len(list(folder.glob(f"{number}-*")))


def _fail_once(folder: Path, number: int) -> int:
    if _attempt(folder, number) == 1 and number == 1:
        raise TransientStorageError("the store had a bad moment")
    return number


def _die_once(folder: Path, number: int) -> int:
    if _attempt(folder, number) == 1 and number == 1:
        os._exit(1)
    return number


def _lose_the_gpu_once(folder: Path, number: int) -> int:
    if _attempt(folder, number) == 1:
        (folder.parent / "lost").write_text(str(os.getpid()))
        raise LostGpuError("a worker lost its GPU")
    return os.getpid()


def _always(folder: Path, error: type[Exception], number: int) -> int:
    _attempt(folder, number)
    raise error("nothing helps")


def _alternate(folder: Path, number: int) -> int:
    """Dies twice and fails twice, in turn, before it returns."""
    attempt = _attempt(folder, number)
    if attempt in (1, 3):
        os._exit(1)
    if attempt in (2, 4):
        raise TransientStorageError("the store had a bad moment")
    return number


def _hang_at_1(folder: Path, number: int) -> int:
    """In C and with the GIL, as a library may: no Python code of this process runs after that."""
    _attempt(folder, number)
    if number == 1:
        ctypes.PyDLL(None).sleep(3600)
    return number


def _name_of_task(_: int) -> str | None:
    return ray.get_runtime_context().get_task_name()


def _odd_shards_are_bad(folder: Path, number: int) -> int:
    _attempt(folder, number)
    if number % 2:
        raise ShardError("this shard is cut", where=f"shard {number % 4}")
    return number


def _fail_by_kind(errors: dict[int, type[StillroomError]], number: int) -> int:
    if number in errors:
        raise errors[number](f"item {number} failed")
    return number


def _items(limit: int, consumed: list[int]) -> Iterator[int]:
    for number in range(limit):
        consumed.append(number)
        yield number


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.ray.task_scheduler.BACKOFF_S", 0.05)


def attempts(folder: Path) -> int:
    return len(list(folder.iterdir()))


def collect(results: Iterator[tuple[int, int]], done: list[int]) -> None:
    """Appends each item to ``done``, also before an error."""
    for item, _ in results:
        done.append(item)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_lost_its_gpu_exits_and_another_worker_takes_its_item(tmp_path: Path) -> None:
    folder = tmp_path / "attempts"
    folder.mkdir()
    ((_, worker),) = fan_out(partial(_lose_the_gpu_once, folder), [1], RAY, what="a task")
    lost = int((tmp_path / "lost").read_text())
    assert worker != lost
    assert attempts(folder) == 2
    assert not psutil.pid_exists(lost) or psutil.Process(lost).status() == psutil.STATUS_ZOMBIE


@pytest.mark.usefixtures("ray_cluster")
def test_every_item_is_returned_once_with_its_result() -> None:
    results = dict(fan_out(_square, range(50), RAY, what="a task"))
    assert results == {number: number * number for number in range(50)}


def test_without_ray_the_work_is_a_plain_loop_in_order() -> None:
    results = list(fan_out(_square, [3, 1, 2], RayConfig(address="none"), what="a task"))
    assert results == [(3, 9), (1, 1), (2, 4)]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("fault", [_fail_once, _die_once], ids=["storage fails", "worker dies"])
def test_a_transient_fault_costs_one_more_attempt_of_one_item(fault, tmp_path: Path) -> None:
    results = dict(fan_out(partial(fault, tmp_path), range(4), RAY, what="a task"))
    assert results == {number: number for number in range(4)}
    assert attempts(tmp_path) == 5


@pytest.mark.usefixtures("ray_cluster")
def test_a_permanent_fault_fails_after_the_counted_retries(tmp_path: Path) -> None:
    with pytest.raises(TransientStorageError) as caught:
        list(fan_out(partial(_always, tmp_path, TransientStorageError), [1], RAY, what="a task"))
    assert caught.value.what == "nothing helps"
    assert attempts(tmp_path) == 1 + RAY.max_retries


@pytest.mark.usefixtures("ray_cluster")
def test_retries_are_counted_by_kind_of_fault_and_each_attempt_is_logged(tmp_path: Path, json_log: JsonLog) -> None:
    name = f"shard of {tmp_path.name}"
    tasks = fan_out(partial(_alternate, tmp_path), [1], RAY, what="a task", name=lambda _: name)
    assert list(tasks) == [(1, 1)]
    assert attempts(tmp_path) == 5
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
    lines = [text.partition(f"a task: {name}: attempt ")[2] for text in _lines_of_workers()]
    assert sorted(line for line in lines if "began" in line) == [f"{number} began on {node}" for number in range(1, 6)]
    ended = sorted((line[0], line.rpartition(f" on {node}, ")[2]) for line in lines if "ended" in line)
    failed_once = "failed: the store had a bad moment"
    assert ended == [("2", failed_once), ("4", failed_once), ("5", "done")]


def _lines_of_workers() -> list[str]:
    folder = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    return [line for log in folder.glob("worker-*.err") for line in log.read_text().splitlines()]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("address", ["none", "local"])
def test_bad_shards_are_reported_together_when_the_others_are_done(address: str, tmp_path: Path) -> None:
    done: list[int] = []
    with pytest.raises(ShardError) as caught:
        collect(
            fan_out(partial(_odd_shards_are_bad, tmp_path), range(8), RayConfig(address=address), what="a task"), done
        )
    assert sorted(done) == [0, 2, 4, 6]
    assert attempts(tmp_path) == 8
    assert str(caught.value).count("this shard is cut") == 2
    assert "shard 1" in str(caught.value)
    assert "shard 3" in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_single_bad_shard_raises_its_own_error() -> None:
    with pytest.raises(ShardError) as caught:
        list(fan_out(partial(_fail_by_kind, {1: ShardError}), range(3), RayConfig(address="none"), what="a task"))
    assert caught.value.what == "item 1 failed"


def test_a_failure_that_may_pass_decides_the_exit_code() -> None:
    errors: dict[int, type[StillroomError]] = {1: ShardError, 2: TransientStorageError}
    with raises("ray.several-failures", TransientStorageError, exit_code=1) as caught:
        list(fan_out(partial(_fail_by_kind, errors), range(4), RayConfig(address="none"), what="a task"))
    assert "item 1 failed" in str(caught.value)
    assert "item 2 failed" in str(caught.value)


@pytest.mark.parametrize("kind", [CacheError, StorageError])
def test_a_failure_that_concerns_all_items_ends_the_work_at_once(kind: type[StillroomError]) -> None:
    done: list[int] = []
    with pytest.raises(kind) as caught:
        collect(fan_out(partial(_fail_by_kind, {2: kind}), range(9), RayConfig(address="none"), what="a task"), done)
    assert caught.value.what == "item 2 failed"
    assert done == [0, 1]


def test_too_many_bad_shards_end_the_work() -> None:
    consumed: list[int] = []
    errors: dict[int, type[StillroomError]] = dict.fromkeys(range(100), ShardError)
    with raises("ray.several-failures", ShardError) as caught:
        list(fan_out(partial(_fail_by_kind, errors), _items(100, consumed), RayConfig(address="none"), what="a task"))
    assert str(caught.value.got).count("failed") == len(consumed) == 17


@pytest.mark.usefixtures("ray_cluster")
def test_items_are_consumed_as_tasks_start() -> None:
    consumed: list[int] = []
    results = cast("Generator[object]", fan_out(_square, _items(1000, consumed), RAY, what="a task"))
    next(results)
    assert len(consumed) <= 2 * NUM_CPUS
    results.close()


@pytest.mark.usefixtures("ray_cluster")
def test_a_bug_in_the_work_keeps_its_traceback_and_is_not_retried(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="_always"):
        list(fan_out(partial(_always, tmp_path, ZeroDivisionError), [1], RAY, what="a task"))
    assert attempts(tmp_path) == 1


@pytest.mark.usefixtures("ray_cluster")
def test_bad_input_is_never_retried(tmp_path: Path) -> None:
    with pytest.raises(ShardError) as caught:
        list(fan_out(partial(_always, tmp_path, ShardError), [1], RAY, what="a task"))
    assert (caught.value.what, caught.value.exit_code) == ("nothing helps", 2)
    assert attempts(tmp_path) == 1


@pytest.mark.usefixtures("ray_cluster")
def test_tasks_that_no_node_could_run_are_refused_at_once() -> None:
    with raises("ray.too-few-resources", ResourceError, exit_code=2) as caught:
        list(fan_out(_square, [1], RayConfig(cpus_per_task=64), what="a cache task"))
    assert (caught.value.got, caught.value.expected) == (f"1 node with {NUM_CPUS} CPU", "64 CPU")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_part_that_hangs_is_ended_retried_and_named_when_the_others_are_done(
    tmp_path: Path, json_log: JsonLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.ray.task_scheduler.SILENT_AFTER_S", 0.5)
    ray_config = RayConfig(max_retries=1, part_timeout_s=3)
    done: list[int] = []
    with raises("ray.part-timeout", StorageError, where="part 1", exit_code=1):
        collect(
            fan_out(partial(_hang_at_1, tmp_path), range(6), ray_config, what="a task", name="part {}".format), done
        )
    assert sorted(done) == [0, 2, 3, 4, 5]
    assert len(list(tmp_path.glob("1-*"))) == 2
    events = json_log()
    assert [(item["item"], item["kind"]) for item in events if item["event"] == "retried"] == [("part 1", "a timeout")]
    silent = [item for item in events if item["event"] == "silent" and item["item"] == "part 1"]
    assert silent
    assert all(item["silent_s"] >= 0.5 for item in silent)
    assert any("Timeout (0:00:03)!" in line for line in _lines_of_workers())


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_part_that_is_done_in_time_does_not_end_its_worker(tmp_path: Path) -> None:
    ray_config = RayConfig(part_timeout_s=1)
    pids = {pid for _, pid in fan_out(partial(_pid_after, tmp_path), range(8), ray_config, what="a task")}
    time.sleep(1.2)
    again = {pid for _, pid in fan_out(partial(_pid_after, tmp_path), range(8), ray_config, what="a task")}
    assert pids & again


def _pid_after(_: Path, number: int) -> int:  # noqa: ARG001
    return os.getpid()


def test_a_time_limit_needs_ray() -> None:
    with pytest.raises(ValueError, match="part_timeout_s"):
        RayConfig(address="none", part_timeout_s=10)


@pytest.mark.usefixtures("ray_cluster")
def test_a_task_is_named_after_its_part() -> None:
    results = dict(fan_out(_name_of_task, [7], RAY, what="cache", name="part {}".format))
    assert results == {7: "cache: part 7"}


@pytest.mark.usefixtures("ray_cluster")
def test_the_number_of_named_tasks_is_limited_since_ray_keeps_metrics_of_every_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jobs.ray.task_scheduler.MAX_NAMED_TASKS", 3)
    results = dict(fan_out(_name_of_task, range(6), RAY, what="cache", name="part {}".format))
    assert [results[number] for number in range(3)] == [f"cache: part {number}" for number in range(3)]
    assert {results[number] for number in range(3, 6)} == {"_call"}
