"""A training step from stored views against a step with labels alone, which decodes photographs.

``mobilenetv3_small_050`` on two ranks with one thread and one loader process each, so that on two cores students and
loaders share the processors. A block starts the loaders, takes a few batches, then times whole steps.

S is the processor time of the student's step per image, the reduction of gradients included, c that of the loader, both
of rank 0 and of the same round. What shares its processors takes at best (S + c_stored) / (S + c_label) of the time.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist

from jobs.build_cache import build_cache
from jobs.index_shards import index_shards
from pipeline.student.data.batch import Batch
from pipeline.student.data.loader import load_batches
from pipeline.student.training.trainer import Trainer
from pipeline.teacher.numerics import retain_freed_memory
from schemas.config import Config
from tests.benchmarks.peers import cpu_seconds, photographs
from tests.benchmarks.timing import Spread, random_resnet, ratio
from tests.pipeline.student.runs import trainer_of
from tests.ranks import group, run_two_ranks

SIZES, RANKS, BATCH, ROUNDS = (128, 224), 2, 32, 7
WARM_UP, STEPS, LOADED_STEPS = 6, 24, 64
"""Batches that a block takes before it is timed: more than the loader processes prepare ahead; steps that it times."""
_LABELS, _STORED = "labels", "stored"
Seconds = dict[str, list[float]]


def run() -> None:
    threads = torch.get_num_threads()
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            _compare(Path(folder), size)
    torch.set_num_threads(threads)


def _config(folder: Path, shards: list[str], size: int, mode: str) -> Config:
    is_cached = mode == _STORED
    return Config.model_validate(
        {
            "data": {
                "shards": shards,
                "num_classes": 1000,
                "index": None if is_cached else f"{folder}/index",
                "cache": f"{folder}/cache" if is_cached else None,
                "local_dir": str(folder),
            },
            # Narrow: what the outputs are makes no difference, and the build takes seconds.
            "teacher": {
                **random_resnet(kwargs={"depth": 8, "widths": [4, 4, 4, 8]}),
                "mode": "cache" if is_cached else "none",
            },
            "views": {"kind": "crop", "count": 1, "size": size, "pixels": "jpeg:90" if is_cached else "none"},
            "cache": {"url": f"{folder}/cache", "logits": "fp16"},
            "student": {"model": "timm/mobilenetv3_small_050", "weights": "random", "interpolation": "bilinear"},
            "loss": [{"name": "kd"}] if is_cached else [{"name": "ce"}],
            "train": {"epochs": 1000, "global_batch_size": RANKS * BATCH, "num_workers": 1},
            "run": {"url": f"{folder}/{mode}"},
            "ray": {"address": "none"},
        }
    )


def _compare(folder: Path, size: int) -> None:
    shards = [str(path) for path in photographs(folder)]
    configs = {mode: _config(folder, shards, size, mode) for mode in (_LABELS, _STORED)}
    build_cache(configs[_STORED])
    index_shards(configs[_LABELS], f"{folder}/index")
    wall, cpu = run_two_ranks(_measure, folder, configs)
    _report(size, wall, cpu)


def _measure(rendezvous: Path, rank: int, configs: dict[str, Config]) -> tuple[Seconds, Seconds]:
    """Wall time of steps by mode and processor time by what takes it, in seconds per image, one value a round."""
    retain_freed_memory()
    with group(rendezvous, rank) as distributed:
        trainers = {mode: trainer_of(config, distributed) for mode, config in configs.items()}
        torch.set_num_threads(1)
        wall: Seconds = {mode: [] for mode in trainers}
        cpu: Seconds = {name: [] for name in ("S", *trainers)}
        for number in range(ROUNDS):
            # Forwards and backwards in turn, so that no mode always follows the same one.
            for mode, trainer in [*trainers.items()][:: 1 if number % 2 else -1]:
                wall[mode].append(_wall_of_steps(trainer) / STEPS / BATCH / RANKS)
                cpu[mode].append(_cpu_of(lambda trainer=trainer: _load(trainer)) / LOADED_STEPS / BATCH)
            cpu["S"].append(_cpu_of(lambda: _train_on_one_batch(trainers[_LABELS])) / STEPS / BATCH)
        for trainer in trainers.values():
            trainer.setup.close()
    return wall, cpu


def _batches(trainer: Trainer, steps: int) -> Generator[Batch]:
    return load_batches(trainer.setup.dataset, range(steps), num_workers=1, pin_memory=False)


def _wall_of_steps(trainer: Trainer) -> float:
    """Seconds of ``STEPS`` steps."""
    with closing(_batches(trainer, 10**6)) as batches:
        for batch in itertools.islice(batches, WARM_UP):
            trainer.train_step(batch)
        dist.barrier()
        began = time.perf_counter()
        for batch in itertools.islice(batches, STEPS):
            trainer.train_step(batch)
        return time.perf_counter() - began


def _load(trainer: Trainer) -> None:
    with closing(_batches(trainer, LOADED_STEPS)) as batches:
        for _ in batches:
            pass


def _train_on_one_batch(trainer: Trainer) -> None:
    batch = trainer.setup.dataset[0]
    for _ in range(STEPS):
        trainer.train_step(batch)


def _cpu_of(work: Callable[[], None]) -> float:
    dist.barrier()
    began = cpu_seconds()
    work()
    return cpu_seconds() - began


def _report(size: int, wall: Seconds, cpu: Seconds) -> None:
    print(f"  {size} pixels, {RANKS} ranks with batches of {BATCH}")
    for name, values in {"S": cpu["S"], "c_label": cpu[_LABELS], "c_stored": cpu[_STORED]}.items():
        print(f"    {name:<9}{Spread.of([value * 1e6 for value in values])} us of processor time an image")
    for mode, values in wall.items():
        print(f"    {mode:<9}{Spread.of([value * 1e6 for value in values])} us of wall time an image")
    labels, stored = ([s + c for s, c in zip(cpu["S"], cpu[mode], strict=True)] for mode in (_LABELS, _STORED))
    print(f"    stored / labels, wall: {ratio(wall[_STORED], wall[_LABELS])}")
    print(f"    (S + c_stored) / (S + c_label): {ratio(stored, labels)}")
