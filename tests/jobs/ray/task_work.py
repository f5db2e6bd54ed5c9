"""Functions for the tasks of ``test_fan_out``. Few imports, since every new worker of Ray imports this module."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import ray

from pipeline.core.errors import LostGpuError, ShardError, StillroomError, TransientStorageError


def square(number: int) -> int:
    return number * number


def process_id(_: int) -> int:
    return os.getpid()


def task_name(_: int) -> str | None:
    return ray.get_runtime_context().get_task_name()


def attempt(folder: Path, number: int) -> int:
    """Writes a file for every attempt and returns their number, including this one."""
    (folder / f"{number}-{len(list(folder.glob(f'{number}-*')))}").touch()
    return len(list(folder.glob(f"{number}-*")))


def fail_once(folder: Path, number: int) -> int:
    if attempt(folder, number) == 1 and number == 1:
        raise TransientStorageError("the store had a bad moment")
    return number


def die_once(folder: Path, number: int) -> int:
    if attempt(folder, number) == 1 and number == 1:
        os._exit(1)
    return number


def lose_the_gpu_once(folder: Path, number: int) -> int:
    if attempt(folder, number) == 1:
        (folder.parent / "lost").write_text(str(os.getpid()))
        raise LostGpuError("a worker lost its GPU")
    return os.getpid()


def always_fail(folder: Path, error: type[Exception], number: int) -> int:
    attempt(folder, number)
    raise error("nothing helps")


def alternate(folder: Path, number: int) -> int:
    """Dies twice and fails twice, in turn, before it returns."""
    num_attempts = attempt(folder, number)
    if num_attempts in (1, 3):
        os._exit(1)
    if num_attempts in (2, 4):
        raise TransientStorageError("the store had a bad moment")
    return number


def hang_at_1(folder: Path, number: int) -> int:
    """In C and with the GIL, as a library may: no Python code of this process runs after that."""
    attempt(folder, number)
    if number == 1:
        ctypes.PyDLL(None).sleep(3600)
    return number


def odd_shards_are_bad(folder: Path, number: int) -> int:
    attempt(folder, number)
    if number % 2:
        raise ShardError("this shard is cut", where=f"shard {number % 4}")
    return number


def fail_by_kind(errors: dict[int, type[StillroomError]], number: int) -> int:
    if number in errors:
        raise errors[number](f"item {number} failed")
    return number
