"""The trainings of a recipe: several at once as Ray tasks where each needs one process, else one after another."""

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
from pipeline.student.evaluation.metrics import Evaluation
from schemas.config import Config, RayConfig


@dataclass(frozen=True, slots=True)
class Row:
    """The result of a training. ``seconds`` are those of the training without the evaluation."""

    evaluation: Evaluation
    seconds: float


def train_and_evaluate(config: Config) -> Row:
    """Trains to the end, from the last checkpoint if there is one, and evaluates the last weights."""
    return _evaluate(config, train_student(config)["seconds"], threads=os.cpu_count() or 1)


def _evaluate(config: Config, seconds: float, *, threads: int) -> Row:
    assert config.run is not None
    assert config.data.val_shards is not None
    reference = config.train.eval_reference
    return Row(evaluate(config.run.url, config.data.val_shards, threads=threads, reference=reference), seconds)


def can_run_in_parallel(runs: Sequence[RunSpec]) -> bool:
    """Whether there are several trainings on Ray, each of one process."""
    single = all(run.config.ray.num_workers == 1 and not run.config.ray.use_gpu for run in runs)
    return single and len(runs) > 1 and runs[0].config.ray.address != "none"


def train_in_parallel(runs: Sequence[RunSpec]) -> list[Row]:
    """Trains as many runs at once as fit, as Ray tasks with ``ray.cpus_per_worker`` CPUs and ``ray.gpus_per_task`` GPUs
    each. A repeated call resumes those that are not finished.

    Raises:
        StillroomError: a run failed permanently.
    """
    first = runs[0].config.ray
    # The timeout of a part does not apply to a training.
    ray = first.model_copy(update={"cpus_per_task": first.cpus_per_worker, "part_timeout_s": None})
    # Tasks run in another folder.
    absolute = [replace(run, config=with_absolute_paths(run.config)) for run in runs]
    rows: dict[str, Row] = {}
    with ProgressView("runs", len(runs)) as progress:
        trained = fan_out(train_run, absolute, ray, what="a training", name=lambda run: run.name, reports_silence=False)
        for run, row in trained:
            rows[run.name] = row
            progress.update(len(rows), run.name)
    return [rows[run.name] for run in runs]


def train_run(run: RunSpec) -> Row:
    """Inside a task: one process, on the task's GPU if it has one."""
    ray = RayConfig.model_validate({"address": "none", "cpus_per_worker": run.config.ray.cpus_per_worker})
    config = run.config.model_copy(update={"ray": ray})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _evaluate(config, train_student(config, device=device)["seconds"], threads=ray.cpus_per_worker)
