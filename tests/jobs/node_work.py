"""What tests give to the nodes of a cluster; imports little, since every new worker imports it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from uuid import uuid4

import ray


def node(seconds: float, _: int) -> str:
    """Where it ran."""
    time.sleep(seconds)
    return ray.get_runtime_context().get_node_id()


def attempt(folder: Path, number: int) -> str:
    """Leaves a file that names its node, which it returns."""
    here = node(0, number)
    (folder / f"{number}-{here}-{uuid4().hex}").touch()
    return here


def wait_for_go(folder: Path, number: int) -> str:
    """An attempt that goes on when ``go`` is there."""
    here = attempt(folder, number)
    while not (folder / "go").exists():
        time.sleep(0.02)
    return here


def take_the_node_along(folder: Path, number: int) -> None:
    """An attempt that number 0 never ends: it kills its node and itself."""
    attempt(folder, number)
    if number == 0:
        os.kill(os.getppid(), signal.SIGKILL)
        os._exit(1)


def attempts(folder: Path) -> list[tuple[int, str]]:
    """(number, node) of every attempt."""
    return [(int(path.name.split("-")[0]), path.name.split("-")[1]) for path in folder.glob("*-*-*")]
