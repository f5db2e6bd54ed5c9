"""What a run tells of itself: the loss of every step, its speed, its evaluations."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pipeline import storage
from pipeline.core.errors import TrainingError
from pipeline.core.temporary import temporary_folder
from pipeline.student.distributed import DistributedContext
from pipeline.student.run.checkpoint import EVALUATIONS, METRICS, SPEED
from pipeline.student.run.tensorboard import TensorBoardWriter

Record = dict[str, float | int | None]


@dataclass(frozen=True, slots=True)
class _Step:
    """One optimiser step whose losses are still on the device."""

    step: int
    epoch: int
    lr: float
    scale: float | None
    values: Tensor


@dataclass
class StepLog:
    """Collects the losses of each step on each rank, kept on the device until somebody has time to look, and turns them
    into their mean over ranks now and then.

    The total is weighted by each rank's rows, so its mean is the loss of the global batch; a term is each rank's own
    mean, so under unequal batches its mean over ranks is near the global one.

    Reading a loss stops the device and asks all ranks, so this happens once in many steps; a loss that is not finite is
    found then, with the range of steps in which it began.
    """

    distributed: DistributedContext
    _rows: list[_Step] = field(default_factory=list)
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
    ) -> None:
        """``grad_norm`` is the same on every rank, as DDP's gradients are; ``scale`` is that of the loss under fp16."""
        values = {"loss": total.detach(), **{f"loss/{name}": value for name, value in terms.items()}}
        if grad_norm is not None:
            values["grad_norm"] = grad_norm
        self._names = tuple(values)
        self._rows.append(_Step(step, epoch, lr, scale, torch.stack([*values.values()])))

    def __len__(self) -> int:
        return len(self._rows)

    def flush(self) -> list[Record]:
        """One record a step since the last flush, the same on every rank.

        Raises:
            TrainingError: a loss is NaN or infinite, or a gradient is that was not merely scaled too much.
        """
        if not self._rows:
            return []
        values = self.distributed.sum(torch.stack([step.values for step in self._rows]).float()) / self.distributed.size
        records = [self._record(step, row) for step, row in zip(self._rows, values.tolist(), strict=True)]
        self._rows.clear()
        _check_finite(records)
        return [{name: _jsonable(value) for name, value in record.items()} for record in records]

    def _record(self, step: _Step, values: Sequence[float]) -> Record:
        scale: Record = {} if step.scale is None else {"scale": step.scale}
        named = dict(zip(self._names, values, strict=True))
        return {"step": step.step, "epoch": step.epoch, "lr": step.lr, **named, **scale}


def _jsonable(value: float | int | None) -> float | int | None:
    """JSON has no infinity: the gradient norm of a step that was skipped becomes null."""
    return value if value is not None and math.isfinite(value) else None


def _check_finite(records: Sequence[Record]) -> None:
    for name in ("loss", "grad_norm"):
        bad = [record["step"] for record in records if not _is_sound(record, name)]
        if bad:
            raise TrainingError(
                "the loss is not finite" if name == "loss" else "the gradients are not finite",
                code=f"train.not-finite-{'loss' if name == 'loss' else 'gradients'}",
                where=f"first in step {bad[0]}, seen between steps {records[0]['step']} and {records[-1]['step']}",
                next_step="lower train.lr, set train.clip_norm, or use train.precision=fp32, in another run.url",
            )


def _is_sound(record: Record, name: str) -> bool:
    """Under fp16 gradients overflow now and then, and the step is skipped."""
    value = record.get(name, 0.0)
    return (value is not None and math.isfinite(value)) or (name == "grad_norm" and "scale" in record)


class _Lines:
    """A file of one JSON object a line, kept here and published whole."""

    def __init__(self, run_url: str, name: str, folder: Path, *, first_step: int) -> None:
        self._url, self._local = storage.join(run_url, name), folder / name
        kept: list[str] = []
        if first_step and (published := storage.read_if_exists(self._url)) is not None:
            kept = [line for line in published.decode().splitlines() if json.loads(line)["step"] < first_step]
        self._local.write_text("".join(f"{line}\n" for line in kept))

    def add(self, records: Sequence[Record]) -> None:
        with self._local.open("a") as handle:
            handle.writelines(json.dumps(record) + "\n" for record in records)

    def publish(self) -> None:
        if self._local.stat().st_size:
            storage.put(self._local, self._url)


def published_evaluation(run_url: str, step: int) -> Record | None:
    """The evaluation after a step, if ``evaluations.jsonl`` of the run has it."""
    published = storage.read_if_exists(storage.join(run_url, EVALUATIONS))
    lines = [] if published is None else [json.loads(line) for line in published.decode().splitlines()]
    return next((line for line in lines if line["step"] == step), None)


class MetricsFile:
    """``metrics.jsonl`` of a run, one object per optimiser step, and beside it ``speed.jsonl``, ``evaluations.jsonl``
    and TensorBoard's event files; each published whole. Use as a context manager.

    What a clock says stands in ``speed.jsonl`` alone, so that the metrics of a resumed run are those of an undisturbed
    one.

    Publish before the checkpoint: a run that resumes drops the steps after its checkpoint, since it computes them
    again, but has no other place to take those before it from.
    """

    def __init__(self, run_url: str, *, first_step: int, tensorboard: bool = False) -> None:
        self._folder = temporary_folder("stillroom-metrics-")
        folder = Path(self._folder.name)
        self._steps, self._speed, self._evaluations = (
            _Lines(run_url, name, folder, first_step=first_step) for name in (METRICS, SPEED, EVALUATIONS)
        )
        self._board = TensorBoardWriter(run_url, first_step=first_step) if tensorboard else None

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()
        self._folder.cleanup()

    def add(self, records: Sequence[Record], speed: Mapping[str, float] | None = None) -> None:
        """Steps in order, and how fast they were. TensorBoard gets the last of them."""
        self._steps.add(records)
        if speed is not None:
            self._speed.add([{"step": records[-1]["step"], **speed}])
        if self._board is not None:
            last = {name: value for name, value in records[-1].items() if name != "step"}
            self._board.add(int(records[-1]["step"] or 0), {**last, **(speed or {})})

    def add_evaluation(self, step: int, epoch: int, found: Mapping[str, float | int | None]) -> None:
        """After this step, which ended the epoch with this 1-based number."""
        self._evaluations.add([{"step": step, "epoch": epoch, **found}])
        if self._board is not None:
            self._board.add(step, found, prefix="eval/")

    def publish_evaluations(self) -> None:
        """After the checkpoint of their step: what is not published is evaluated again by a run that resumes."""
        self._evaluations.publish()
        if self._board is not None:
            self._board.publish()

    def publish(self) -> None:
        for lines in (self._steps, self._speed, self._evaluations):
            lines.publish()
        if self._board is not None:
            self._board.publish()
