"""The trainings of a recipe: several at once as Ray tasks where each needs one process, else one after the other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from jobs.observability.progress import ProgressView
from jobs.paths import with_absolute_paths
from jobs.ray.fan_out import fan_out
from jobs.recipes.document import RunSpec
from jobs.run_ops import evaluate
from jobs.train_student import train_student
from pipeline.student.evaluation.evaluator import Evaluation
from schemas.config import Config, RayConfig


@dataclass(frozen=True, slots=True)
class Row:
    """What a training came to; ``seconds`` of training alone."""

    evaluation: Evaluation
    seconds: float


def train_and_evaluate(config: Config) -> Row:
    """Trains to the end, from wherever the run stands, and evaluates the last weights."""
    return _evaluated(config, train_student(config)["seconds"], threads=os.cpu_count() or 1)


def _evaluated(config: Config, seconds: float, *, threads: int) -> Row:
    assert config.run is not None
    assert config.data.val_shards is not None
    return Row(evaluate(config.run.url, config.data.val_shards, threads=threads), seconds)


def can_share(specs: Sequence[RunSpec]) -> bool:
    """Whether these trainings can run beside each other: there are several, in a cluster, of one process each."""
    alone = all(spec.config.ray.num_workers == 1 and not spec.config.ray.use_gpu for spec in specs)
    return alone and len(specs) > 1 and specs[0].config.ray.address != "none"


def train_together(specs: Sequence[RunSpec]) -> list[Row]:
    """As Ray tasks with ``ray.cpus_per_worker`` CPUs and ``ray.gpus_per_task`` GPUs each, as many at once as fit.

    Raises:
        StillroomError: a cell failed for good. Run again: finished ones are left as they are, others go on.
    """
    first = specs[0].config.ray
    # A training is no part: it lasts as long as it lasts.
    ray = first.model_copy(update={"cpus_per_task": first.cpus_per_worker, "part_timeout_s": None})
    # Tasks run in another folder.
    placed = [replace(spec, config=with_absolute_paths(spec.config)) for spec in specs]
    rows: dict[str, Row] = {}
    with ProgressView("cells", len(specs)) as progress:
        trained = fan_out(train_run, placed, ray, what="a training", name=lambda spec: spec.name, reports_silence=False)
        for spec, row in trained:
            rows[spec.name] = row
            progress.update(len(rows), spec.name)
    return [rows[spec.name] for spec in specs]


def train_run(spec: RunSpec) -> Row:
    """Inside a task: one process, on the task's GPU if it has one."""
    alone = RayConfig.model_validate({"address": "none", "cpus_per_worker": spec.config.ray.cpus_per_worker})
    config = spec.config.model_copy(update={"ray": alone})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _evaluated(config, train_student(config, device=device)["seconds"], threads=alone.cpus_per_worker)
