"""Other processes for tests of several ranks, without the seconds that imports cost each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.student.distributed import DistributedContext

_HEAVY = ["pipeline.student.training.trainer", "torch.distributed"]
_TIMEOUT_S = 120

T = TypeVar("T")


def forked() -> ForkServerContext:
    """Processes are copies of one that has imported the heavy modules and used none of them."""
    context: Any = mp.get_context("forkserver")
    context.set_forkserver_preload(_HEAVY)
    return context


@contextmanager
def group(rendezvous: Path, rank: int, size: int = 2) -> Iterator[DistributedContext]:
    """A rank of a gloo group; ``rendezvous`` is a file that none has used before."""
    timeout = timedelta(seconds=_TIMEOUT_S)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=timeout)
    try:
        yield DistributedContext(rank=rank, size=size)
    finally:
        dist.destroy_process_group()


def run_two_ranks(work: Callable[..., T], folder: Path, *arguments: object) -> T:
    """``work(rendezvous, rank, *arguments)`` as rank 0 in this process and as rank 1 in another one.

    Returns what rank 0 returned.
    """
    rendezvous = folder / "rendezvous"
    other = forked().Process(target=work, args=(rendezvous, 1, *arguments))
    other.start()
    try:
        result = work(rendezvous, 0, *arguments)
        other.join(_TIMEOUT_S)
    finally:
        other.kill()
        other.join()
    assert other.exitcode == 0
    return result
