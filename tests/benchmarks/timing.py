"""Interleaved timing: each variant in turn, many rounds, ratios within a round; a slow machine slows all equally."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
CIFAR = SHARED / "cifar10"
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4)
        return cls(low, median, high)

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g} to {self.high:.4g})"


class Stopwatch:
    """Adds up the CPU time of the calling threads inside some functions, which do not call each other.

    Not wall time: work that runs in parallel with a teacher on all cores mostly waits.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def on(self, functions: Iterable[tuple[type, str]]) -> Iterator[None]:
        """Watches these methods, given as (class, name), for the length of a ``with``."""
        originals = [(owner, name, getattr(owner, name)) for owner, name in functions]
        for owner, name, original in originals:
            setattr(owner, name, self._watched(original))
        try:
            yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)

    def _watched(self, original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            began = time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - began

        return call


def interleaved(
    variants: Mapping[Name, Callable[[], object]], *, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[Name, list[float]]:
    """Seconds of each call; one warm-up round is not counted."""
    seconds: dict[Name, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, call in variants.items():
            began = clock()
            call()
            if number:
                seconds[name].append(clock() - began)
    return seconds


def ratio(above: list[float], below: list[float]) -> Spread:
    """Of one round's times, over all rounds."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def random_resnet(depth: int = 8, **keys: object) -> dict[str, object]:
    """The section of a network of CIFAR's size that learnt nothing."""
    return {
        "model": "python:pipeline.models.cifar:resnet",
        "weights": "random",
        "kwargs": {"depth": depth},
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        **keys,
    }


def has_fast_bf16() -> bool:
    """Whether this CPU has instructions for bf16; others emulate it, ten times slower than fp32."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def machine() -> str:
    """What a number must be read with."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return (
        f"{os.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}, commit {commit.stdout.strip() or '-'}"
    )
