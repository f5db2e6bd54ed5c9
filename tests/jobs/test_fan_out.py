"""Tasks: bounded flight, counted retries, one error."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from jobs.fan_out import fan_out
from pipeline.errors import ResourceError, ShardError, StorageError
from schemas.config import RayConfig

pytestmark = pytest.mark.ray
RAY = RayConfig(max_retries=2)


def _square(number: int) -> int:
    return number * number


def _attempt(folder: Path, number: int) -> int:
    """Leaves a file for every attempt and returns how many there were, this one included."""
    (folder / f"{number}-{len(list(folder.glob(f'{number}-*')))}").touch()
    return len(list(folder.glob(f"{number}-*")))


def _fail_once(folder: Path, number: int) -> int:
    if _attempt(folder, number) == 1 and number == 1:
        raise StorageError("the store had a bad moment")
    return number


def _die_once(folder: Path, number: int) -> int:
    if _attempt(folder, number) == 1 and number == 1:
        os._exit(1)
    return number


def _always(folder: Path, error: type[Exception], number: int) -> int:
    _attempt(folder, number)
    raise error("nothing helps")


def attempts(folder: Path) -> int:
    return len(list(folder.iterdir()))


@pytest.mark.usefixtures("ray_cluster")
def test_every_item_comes_back_once_with_its_result() -> None:
    found = dict(fan_out(_square, range(50), RAY, what="a task"))
    assert found == {number: number * number for number in range(50)}


def test_without_ray_the_work_is_a_plain_loop_in_order() -> None:
    found = list(fan_out(_square, [3, 1, 2], RayConfig(address="none"), what="a task"))
    assert found == [(3, 9), (1, 1), (2, 4)]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("fault", [_fail_once, _die_once], ids=["storage fails", "worker dies"])
def test_a_passing_fault_costs_one_more_attempt_of_one_item(fault, tmp_path: Path) -> None:
    found = dict(fan_out(partial(fault, tmp_path), range(4), RAY, what="a task"))
    assert found == {number: number for number in range(4)}
    assert attempts(tmp_path) == 5


@pytest.mark.usefixtures("ray_cluster")
def test_a_fault_that_stays_ends_after_the_counted_retries(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nothing helps"):
        list(fan_out(partial(_always, tmp_path, StorageError), [1], RAY, what="a task"))
    assert attempts(tmp_path) == 1 + RAY.max_retries


@pytest.mark.usefixtures("ray_cluster")
def test_bad_input_is_never_retried(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="nothing helps") as caught:
        list(fan_out(partial(_always, tmp_path, ShardError), [1], RAY, what="a task"))
    assert caught.value.exit_code == 2
    assert attempts(tmp_path) == 1


@pytest.mark.usefixtures("ray_cluster")
def test_tasks_that_no_node_could_run_are_refused_at_once() -> None:
    with pytest.raises(ResourceError) as caught:
        list(fan_out(_square, [1], RayConfig(cpus_per_task=64), what="a cache task"))
    assert caught.value.exit_code == 2
    assert "4 CPU" in str(caught.value)
    assert "64 CPU" in str(caught.value)
