"""The loss of every optimiser step, kept on the device until somebody has time to look."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pipeline import storage
from pipeline.errors import TrainingError
from pipeline.student.world import World


@dataclass
class StepLog:
    """Collects [1 + terms] values a step on each rank and turns them into their mean over ranks now and then.

    The total is weighted by each rank's rows, so its mean is the loss of the global batch; a term is each rank's own
    mean, so under unequal batches its mean over ranks is near the global one.

    Reading a loss stops the device and asks all ranks, so this happens once in many steps; a loss that is not finite is
    found then, with the range of steps in which it began.
    """

    world: World
    _rows: list[tuple[int, int, float, Tensor]] = field(default_factory=list)
    _names: tuple[str, ...] = ()

    def add(self, step: int, epoch: int, lr: float, total: Tensor, terms: dict[str, Tensor]) -> None:
        self._names = tuple(terms)
        self._rows.append((step, epoch, lr, torch.stack([total.detach(), *terms.values()])))

    def __len__(self) -> int:
        return len(self._rows)

    def flush(self) -> list[dict[str, float | int]]:
        """One record a step since the last flush, the same on every rank.

        Raises:
            TrainingError: a loss is NaN or infinite.
        """
        if not self._rows:
            return []
        values = self.world.sum(torch.stack([row[3] for row in self._rows]).float()) / self.world.size
        records: list[dict[str, float | int]] = []
        for (step, epoch, lr, _), losses in zip(self._rows, values.tolist(), strict=True):
            terms = {f"loss/{name}": value for name, value in zip(self._names, losses[1:], strict=True)}
            records.append({"step": step, "epoch": epoch, "lr": lr, "loss": losses[0], **terms})
        self._rows.clear()
        bad = [int(record["step"]) for record in records if not math.isfinite(record["loss"])]
        if bad:
            raise TrainingError(
                "the loss is not finite",
                where=f"first in step {bad[0]}, seen between steps {records[0]['step']} and {records[-1]['step']}",
                next_step="lower train.lr, set train.clip_norm, or use train.precision=fp32, in another run.url",
            )
        return records


class MetricsFile:
    """``metrics.jsonl`` of a run: one object per optimiser step, published whole. Use as a context manager.

    Publish before the checkpoint: a run that resumes drops the steps after its checkpoint, since it computes them
    again, but has no other place to take those before it from.
    """

    def __init__(self, run_url: str, *, first_step: int) -> None:
        self._url = storage.join(run_url, "metrics.jsonl")
        self._folder = tempfile.TemporaryDirectory(prefix="stillroom-metrics-")
        self._local = Path(self._folder.name) / "metrics.jsonl"
        kept: list[str] = []
        if first_step and storage.exists(self._url):
            lines = storage.read(self._url).decode().splitlines()
            kept = [line for line in lines if json.loads(line)["step"] < first_step]
        self._local.write_text("".join(f"{line}\n" for line in kept))

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def add(self, records: list[dict[str, float | int]]) -> None:
        with self._local.open("a") as handle:
            handle.writelines(json.dumps(record) + "\n" for record in records)

    def publish(self) -> None:
        storage.put(self._local, self._url)
