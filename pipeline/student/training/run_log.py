"""Events and metrics of a run: each rank adds its steps, the main rank writes files and reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pipeline.student.data.batch import Batch
from pipeline.student.distributed import DistributedContext
from pipeline.student.evaluation.metrics import Evaluation
from pipeline.student.run.metrics_files import MetricsFile, Record, StepLog
from pipeline.student.training.train_step import StepResult

Report = Callable[[dict[str, Any]], None]
Emit = Callable[..., None]
"""``emit(kind, **values)``."""


class RunLog:
    """What a run reports while it trains.

    Attributes:
        steps: losses that are still on the device.
        speed: throughput since the last record.
    """

    def __init__(
        self, run_url: str, distributed: DistributedContext, report: Report, *, views_per_image: int = 1
    ) -> None:
        self._run_url, self._report = run_url, report
        self._is_main_rank = distributed.is_main_rank
        self.steps, self.speed = StepLog(distributed), ThroughputMeter(views_per_image)
        self._metrics: MetricsFile | None = None

    def emit(self, kind: str, **values: Any) -> None:
        """Reports an event, on the main rank."""
        if self._is_main_rank:
            self._report({"kind": kind, "run": self._run_url, **values})

    @contextmanager
    def files(self, *, first_step: int, tensorboard: bool) -> Generator[None]:
        """Opens the metrics files, on the main rank."""
        if not self._is_main_rank:
            yield
            return
        with MetricsFile(self._run_url, first_step=first_step, tensorboard=tensorboard) as self._metrics:
            yield

    def add_step(self, batch: Batch, result: StepResult) -> None:
        """Without waiting for the device."""
        update = result.update
        self.steps.add(
            batch.step,
            batch.epoch,
            update.lr,
            result.total,
            result.terms,
            grad_norm=update.grad_norm,
            scale=update.scale,
            gradient_norms=result.gradient_norms,
        )

    def write(self, records: list[Record], *, total_steps: int, seconds: float) -> None:
        """Adds flushed steps to the metrics, and reports the last of them."""
        if self._metrics is not None:
            speed = self.speed.read()
            self._metrics.add(records, speed)
            self.emit("step", total_steps=total_steps, seconds=seconds, **records[-1], **speed)

    def write_evaluation(self, step: int, epoch: int, evaluation: Evaluation, *, publish: bool) -> None:
        """After this step, which ended the epoch with this 1-based number."""
        if self._metrics is not None:
            self._metrics.add_evaluation(step, epoch, evaluation.measured(), evaluation.tables())
            if publish:
                self._metrics.publish_evaluations()

    def publish(self) -> None:
        """Replaces the run's metrics files. Call it before a checkpoint is saved."""
        if self._metrics is not None:
            self._metrics.publish()


@dataclass(slots=True)
class ThroughputMeter:
    """Counts images and waiting time since it was last read or reset.

    Steps are queued on the device; read the meter when the device has finished them.

    Attributes:
        views_per_image: rows of a batch that are views of one image.
    """

    views_per_image: int = 1
    clock: Callable[[], float] = time.monotonic
    _began: float = field(init=False)
    _wait_s: float = field(init=False)
    _rows: int = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yields the same batches; counts their rows over all ranks, and the time that the loader takes for each."""
        while True:
            requested = self.clock()
            batch = next(batches, None)
            if batch is None:
                return
            self._wait_s += self.clock() - requested
            self._rows += batch.num_rows_global
            yield batch

    def read(self) -> dict[str, float]:
        """``images_per_s`` over all ranks, ``views_per_s`` if an image has several views in a batch, and ``data_wait``:
        the share of time in which this rank waited for data."""
        elapsed_s = max(self.clock() - self._began, 1e-9)
        values = {
            "images_per_s": round(self._rows / self.views_per_image / elapsed_s, 2),
            **({"views_per_s": round(self._rows / elapsed_s, 2)} if self.views_per_image > 1 else {}),
            "data_wait": round(min(self._wait_s / elapsed_s, 1.0), 4),
        }
        self.reset()
        return values

    def reset(self) -> None:
        """Excludes the time since the last call, such as that of an evaluation."""
        self._began, self._wait_s, self._rows = self.clock(), 0.0, 0
