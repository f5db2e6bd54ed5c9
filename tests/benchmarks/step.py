"""A training step from a cache against one with labels alone, and one with an online teacher against its parts.

Whole steps: reading, decoding and joining in the training process, forward, loss, backward, optimiser.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from scipy.stats import binom

from jobs.build_cache import build_cache
from jobs.index_shards import index_shards
from pipeline.student.data.batch import Batch
from pipeline.student.data.loader import load_batches
from pipeline.teacher.numerics import retain_freed_memory
from schemas.config import Config
from tests.benchmarks.timing import SHARED, Spread, random_resnet
from tests.pipeline.student.runs import trainer_of

BLOCKS, STEPS_A_BLOCK = 24, 3
THREADS = 2


def _config(folder: str, mode: str) -> Config:
    """ResNet-20 learns from ResNet-56 on crops of CIFAR-10."""
    return Config.model_validate(
        {
            "data": {
                "shards": str(SHARED / "cifar10" / "train-{00000..00009}.tar"),
                "num_classes": 10,
                "index": f"{folder}/index",
                "cache": f"{folder}/cache" if mode == "cache" else None,
                "local_dir": folder,
            },
            "teacher": random_resnet(56, mode=mode, batch_size=128),
            "views": {"kind": "crop", "count": 1, "size": 32},
            "cache": {"url": f"{folder}/cache"},
            "student": random_resnet(20),
            "loss": [{"name": "ce"}] if mode == "none" else [{"name": "kd"}],
            "train": {"epochs": 10, "global_batch_size": 128, "optimizer": "sgd", "lr": 0.01},
            "run": {"url": f"{folder}/{mode}"},
            "ray": {"address": "none", "cpus_per_worker": THREADS},
        }
    )


class _Run:
    """One training, a block of steps at a time."""

    def __init__(self, config: Config) -> None:
        self.trainer = trainer_of(config)
        steps = range(self.trainer.setup.total_steps)
        self.batches: Iterator[Batch] = load_batches(self.trainer.setup.dataset, steps, num_workers=0, pin_memory=False)

    def block(self) -> None:
        for batch in itertools.islice(self.batches, STEPS_A_BLOCK):
            self.trainer.log.add_step(batch, self.trainer.train_step(batch))
        self.trainer.log.steps.flush()


def _forward(run: _Run) -> Callable[[], None]:
    """The teacher alone, on as many batches."""
    teacher, batch = run.trainer.setup.supervision.teachers[0], next(run.batches)

    def block() -> None:
        for _ in range(STEPS_A_BLOCK):
            teacher.forward(batch.pixels_BCHW)

    return block


def run() -> None:
    torch.set_num_threads(THREADS)
    retain_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        build_cache(_config(folder, "cache"))
        index_shards(_config(folder, "none"), f"{folder}/index")
        runs = {name: _Run(_config(folder, mode)) for name, mode in _MODES.items()}
        variants: dict[str, Callable[[], Any]] = {name: one.block for name, one in runs.items()}
        _report(_interleaved({**variants, "teacher": _forward(runs["online"])}))
        for one in runs.values():
            one.trainer.setup.close()


_MODES = {"labels": "none", "cached": "cache", "online": "online"}


def _interleaved(variants: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds a step, by block. Forwards and backwards in turn, so that no variant always follows the same one."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-2, BLOCKS):
        for name, block in [*variants.items()][:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            block()
            if number >= 0:
                seconds[name].append((time.perf_counter() - began) / STEPS_A_BLOCK)
    return seconds


def _report(seconds: dict[str, list[float]]) -> None:
    for name, values in seconds.items():
        print(f"  {name:<8}{Spread.of([value * 1e3 for value in values])} ms a step")
    cached = [one / other for one, other in zip(seconds["cached"], seconds["labels"], strict=True)]
    print(f"  cached / labels: {_with_interval(cached)}")
    paid = [online / own for online, own in zip(seconds["online"], seconds["cached"], strict=True)]
    due = [(teacher + cached) / cached for teacher, cached in zip(seconds["teacher"], seconds["cached"], strict=True)]
    print(f"  online / cached: {_with_interval(paid)}")
    print(f"  (teacher + cached) / cached: {_with_interval(due)}")
    print(f"  the first over the second: {_with_interval([a / b for a, b in zip(paid, due, strict=True)])}")


def _with_interval(ratios: list[float]) -> str:
    """Median with its 95 % interval, from order statistics: no distribution is assumed."""
    ordered, below = sorted(ratios), int(binom.ppf(0.025, len(ratios), 0.5)) - 1
    return f"{statistics.median(ratios):.4f} ({ordered[below]:.4f} to {ordered[-1 - below]:.4f})"
