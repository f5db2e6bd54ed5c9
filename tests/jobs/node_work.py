"""What tests give to the nodes of a cluster; imports little, since every new worker imports it."""

from __future__ import annotations

import time
from pathlib import Path
from uuid import uuid4

import ray


def node(seconds: float, _: int) -> str:
    """Where it ran."""
    time.sleep(seconds)
    return ray.get_runtime_context().get_node_id()


def wait_for_go(folder: Path, number: int) -> str:
    """Leaves a file that names its node, and goes on when ``go`` is there."""
    here = node(0, number)
    (folder / f"{number}-{here}-{uuid4().hex}").touch()
    while not (folder / "go").exists():
        time.sleep(0.02)
    return here


def attempts(folder: Path) -> list[tuple[int, str]]:
    """(number, node) of every attempt."""
    return [(int(path.name.split("-")[0]), path.name.split("-")[1]) for path in folder.glob("*-*-*")]
