"""Functions for the nodes of a test's cluster. Few imports, since every new worker imports this module."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from uuid import uuid4

import ray


def node(seconds: float, _: int) -> str:
    """Returns the id of its node after some seconds."""
    time.sleep(seconds)
    return ray.get_runtime_context().get_node_id()


def attempt(folder: Path, number: int) -> str:
    """Writes a file that names its node, and returns the id of the node."""
    node_id = node(0, number)
    (folder / f"{number}-{node_id}-{uuid4().hex}").touch()
    return node_id


def wait_for_go(folder: Path, number: int) -> str:
    """An attempt that waits for the file ``go``."""
    node_id = attempt(folder, number)
    while not (folder / "go").exists():
        time.sleep(0.02)
    return node_id


def kill_the_node(folder: Path, number: int) -> None:
    """An attempt; that of item 0 kills its node and itself."""
    attempt(folder, number)
    if number == 0:
        os.kill(os.getppid(), signal.SIGKILL)
        os._exit(1)


def attempts(folder: Path) -> list[tuple[int, str]]:
    """(number, node) of every attempt."""
    return [(int(path.name.split("-")[0]), path.name.split("-")[1]) for path in folder.glob("*-*-*")]
