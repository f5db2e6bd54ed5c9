"""Metrics files of a run: the loss of every step, throughput, evaluations."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from pipeline import storage
from pipeline.core.errors import TrainingError
from pipeline.core.temporary import temporary_folder
from pipeline.student.distributed import DistributedContext
from pipeline.student.run.checkpoint import EVALUATIONS, METRICS, SPEED

_GRADIENT_NORM = "gradient_norm/"
Record = dict[str, float | int | None]


@dataclass(frozen=True, slots=True)
class _Step:
    """One optimiser step whose losses are still on the device."""

    step: int
    epoch: int
    lr: float
    scale: float | None
    values: Tensor
    gradient_norms: Mapping[str, Tensor]


@dataclass
class StepLog:
    """Collects the losses of each step on the device, and averages them over ranks at each ``flush``.

    The total is weighted by each rank's rows, so its mean is the loss of the global batch. A term is the mean over the
    rank's rows, so its mean over ranks is approximate if the ranks' batches differ in size.

    A flush waits for the device and for all ranks, so call it once in many steps. It detects a loss that is not finite,
    and reports the range of steps in which it began.
    """

    distributed: DistributedContext
    _steps: list[_Step] = field(default_factory=list)
    _names: tuple[str, ...] = ()

    def add(
        self,
        step: int,
        epoch: int,
        lr: float,
        total: Tensor,
        terms: Mapping[str, Tensor],
        *,
        grad_norm: Tensor | None = None,
        scale: float | None = None,
        gradient_norms: Mapping[str, Tensor] | None = None,
    ) -> None:
        """``grad_norm`` and ``gradient_norms`` are the same on every rank; ``scale`` is the loss scale under fp16."""
        values = {"loss": total.detach(), **{f"loss/{name}": value for name, value in terms.items()}}
        if grad_norm is not None:
            values["grad_norm"] = grad_norm
        self._names = tuple(values)
        self._steps.append(_Step(step, epoch, lr, scale, torch.stack([*values.values()]), gradient_norms or {}))

    def __len__(self) -> int:
        return len(self._steps)

    def flush(self) -> list[Record]:
        """One record for each step since the last flush, the same on every rank. Every rank calls it.

        Raises:
            TrainingError: a loss is NaN or infinite, or a gradient without loss scaling is.
        """
        if not self._steps:
            return []
        values = (
            self.distributed.sum(torch.stack([step.values for step in self._steps]).float()) / self.distributed.size
        )
        records = [self._record(step, row) for step, row in zip(self._steps, values.tolist(), strict=True)]
        self._steps.clear()
        _check_finite(records)
        return [{name: _jsonable(value) for name, value in record.items()} for record in records]

    def _record(self, step: _Step, values: Sequence[float]) -> Record:
        scale: Record = {} if step.scale is None else {"scale": step.scale}
        named = dict(zip(self._names, values, strict=True))
        norms = {f"{_GRADIENT_NORM}{term}": float(norm) for term, norm in step.gradient_norms.items()}
        return {"step": step.step, "epoch": step.epoch, "lr": step.lr, **named, **scale, **norms}


def _jsonable(value: float | int | None) -> float | int | None:
    """JSON has no infinity: the gradient norm of a skipped step becomes null."""
    return value if value is not None and math.isfinite(value) else None


def _check_finite(records: Sequence[Record]) -> None:
    for name in ("loss", "grad_norm"):
        bad = [record["step"] for record in records if not _is_valid(record, name)]
        if bad:
            raise TrainingError(
                "the loss is not finite" if name == "loss" else "the gradients are not finite",
                code="train.not-finite-loss" if name == "loss" else "train.not-finite-gradients",
                where=f"first in step {bad[0]}, seen between steps {records[0]['step']} and {records[-1]['step']}",
                next_step="lower train.lr, set train.clip_norm, or use train.precision=fp32, in another run.url",
            )


def _is_valid(record: Record, name: str) -> bool:
    """Under fp16 a gradient may overflow; the step is then skipped."""
    value = record.get(name, 0.0)
    return (value is not None and math.isfinite(value)) or (name == "grad_norm" and "scale" in record)


class _JsonLines:
    """A local file with one JSON object per line, published as a whole."""

    def __init__(self, run_url: str, name: str, folder: Path, *, first_step: int) -> None:
        self._url, self._local = storage.join(run_url, name), folder / name
        earlier: list[str] = []
        if first_step and (published := storage.read_if_exists(self._url)) is not None:
            earlier = [line for line in published.decode().splitlines() if json.loads(line)["step"] < first_step]
        self._local.write_text("".join(f"{line}\n" for line in earlier))

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        with self._local.open("a") as handle:
            handle.writelines(json.dumps(record) + "\n" for record in records)

    def publish(self) -> None:
        if self._local.stat().st_size:
            storage.put(self._local, self._url)


def published_evaluation(run_url: str, step: int) -> Record | None:
    """The evaluation after a step; None: ``evaluations.jsonl`` of the run lacks it."""
    published = storage.read_if_exists(storage.join(run_url, EVALUATIONS))
    lines = [] if published is None else [json.loads(line) for line in published.decode().splitlines()]
    return next((line for line in lines if line["step"] == step), None)


class TensorBoardWriter:
    """The event file of one start of a run.

    Its name has the first step, so that a start from the same checkpoint replaces it. TensorBoard reads the files of
    all starts in order and drops the steps that a later start repeats.
    """

    def __init__(self, run_url: str, *, first_step: int) -> None:
        self._url = storage.join(run_url, "tensorboard", f"events.out.tfevents.{first_step:010d}")
        self._folder = temporary_folder("stillroom-board-")
        self._writer = SummaryWriter(self._folder.name, purge_step=first_step)

    def add(self, step: int, values: Mapping[str, float | int | None], *, prefix: str = "") -> None:
        """One point of each curve."""
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(prefix + name, value, step)

    def publish(self) -> None:
        self._writer.flush()
        (file,) = Path(self._folder.name).iterdir()
        storage.put(file, self._url)

    def close(self) -> None:
        self._writer.close()
        self._folder.cleanup()


class MetricsFile:
    """``metrics.jsonl`` of a run with one object per optimiser step, ``speed.jsonl``, ``evaluations.jsonl`` and
    TensorBoard's event files; each is published as a whole. Use as a context manager.

    Only ``speed.jsonl`` has measured times, so that the metrics of a resumed run equal those of an undisturbed one.

    Publish before saving a checkpoint: a resumed run computes the steps after its checkpoint again, but has no other
    source for the steps before it.
    """

    def __init__(self, run_url: str, *, first_step: int, tensorboard: bool = False) -> None:
        self._folder = temporary_folder("stillroom-metrics-")
        folder = Path(self._folder.name)
        self._metrics, self._speed, self._evaluations = (
            _JsonLines(run_url, name, folder, first_step=first_step) for name in (METRICS, SPEED, EVALUATIONS)
        )
        self._tensorboard = TensorBoardWriter(run_url, first_step=first_step) if tensorboard else None

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._folder.cleanup()

    def add(self, records: Sequence[Record], speed: Mapping[str, float] | None = None) -> None:
        """Adds steps in order, and their throughput. TensorBoard gets the last of them, and all gradient norms."""
        self._metrics.add(records)
        if speed is not None:
            self._speed.add([{"step": records[-1]["step"], **speed}])
        if self._tensorboard is not None:
            for record in records[:-1]:
                norms = {name: value for name, value in record.items() if name.startswith(_GRADIENT_NORM)}
                self._tensorboard.add(int(record["step"] or 0), norms)
            last = {name: value for name, value in records[-1].items() if name != "step"}
            self._tensorboard.add(int(records[-1]["step"] or 0), {**last, **(speed or {})})

    def add_evaluation(
        self,
        step: int,
        epoch: int,
        evaluation: Mapping[str, float | int | None],
        tables: Mapping[str, Any] | None = None,
    ) -> None:
        """Adds the evaluation after this step, the last one of this 1-based epoch. TensorBoard gets the metrics of
        domains, as ``eval/domain/NAME/KEY``, and no other tables."""
        self._evaluations.add([{"step": step, "epoch": epoch, **evaluation, **(tables or {})}])
        if self._tensorboard is not None:
            self._tensorboard.add(step, evaluation, prefix="eval/")
            for domain, values in (tables or {}).get("by_domain", {}).items():
                self._tensorboard.add(step, values, prefix=f"eval/domain/{domain}/")

    def publish_evaluations(self) -> None:
        """Call it after their checkpoint is saved: a resumed run repeats evaluations that are not published."""
        self._evaluations.publish()
        if self._tensorboard is not None:
            self._tensorboard.publish()

    def publish(self) -> None:
        for lines in (self._metrics, self._speed, self._evaluations):
            lines.publish()
        if self._tensorboard is not None:
            self._tensorboard.publish()
