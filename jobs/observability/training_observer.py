"""Observes a training: progress, log, metrics, and a summary at the end."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from rich.filesize import decimal
from rich.table import Table

from jobs.observability import ray_metrics
from jobs.observability.log import counted, emit
from jobs.observability.progress import ProgressView
from pipeline import storage
from pipeline.student.evaluation.metrics import metrics_of
from schemas.config import Config

_STEP_METRICS = {
    "loss": ray_metrics.LOSS,
    "lr": ray_metrics.LEARNING_RATE,
    "epoch": ray_metrics.EPOCH,
    "images_per_s": ray_metrics.IMAGES_PER_S,
    "data_wait": ray_metrics.DATA_WAIT,
}


class TrainingObserver:
    """Observes one training over all starts of its workers. A context manager; its end logs the summary."""

    def __init__(self, config: Config, *, clock: Callable[[], float] = time.monotonic) -> None:
        assert config.run is not None
        self.run, self.starts = storage.last_name(config.run.url), 0
        self._config, self._clock = config, clock
        self._progress: ProgressView | None = None
        self._nodes: dict[int, str] = {}
        self._counted_s, self._worker_s = clock(), 0.0
        images_per_step = config.train.global_batch_size // config.train.views_per_image
        self._speed, self._last_step = _MeanSpeed(images_per_step), -1
        self._repeated_steps = 0
        self._latest: dict[str, float] = {}
        self._metrics = metrics_of(config.data, config.train.best)
        self._gauges = ray_metrics.evaluation_gauges(self._metrics)

    def __enter__(self) -> TrainingObserver:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._progress is not None:
            self._progress.__exit__(*error)
        self._add_worker_time()
        self._log_summary()

    def observe(self, event: dict[str, Any]) -> None:
        """An event of the training loop; or one of kind ``rank``, with ``rank``, ``world_size`` and ``node``."""
        fields = {name: value for name, value in event.items() if name not in ("kind", "run")}
        match event["kind"]:
            case "warning":
                self._emit(f"warning: {fields.pop('text')}", "warning", logging.WARNING, fields)
            case "validation":
                self._log_validation(fields)
            case "validation-teacher":
                self._log_teacher_validation(fields)
            case "rank":
                self._add_rank(fields)
            case "begin":
                self._begin(fields)
            case "step":
                self._step(fields)
            case "eval":
                self._evaluated(fields)
            case _:
                pass

    def _emit(self, text: str, event: str, level: int, fields: dict[str, Any]) -> None:
        emit(f"train {self.run}: {text}", event=event, level=level, run=self.run, attempt=self.starts, **fields)

    def _log_validation(self, fields: dict[str, Any]) -> None:
        """The cost of reading the validation samples before the first step."""
        text = f"{counted(fields['samples'], 'validation sample')} in {counted(fields['shards'], 'shard')}"
        self._emit(f"{text} read and checked in {fields['read_s']:.1f} s", "validation", logging.INFO, fields)

    def _log_teacher_validation(self, fields: dict[str, Any]) -> None:
        """The cost of computing the teacher's outputs for the validation images, before the first step."""
        text = f"the teacher's outputs for the validation images, {decimal(fields['size_bytes'])} per rank"
        self._emit(f"{text}, took {fields['seconds']:.1f} s", "validation-teacher", logging.INFO, fields)

    def _add_rank(self, fields: dict[str, Any]) -> None:
        self._add_worker_time()
        self._nodes[fields["rank"]] = fields["node"]
        # The world may be smaller than before.
        self._nodes = {rank: node for rank, node in self._nodes.items() if rank < fields["world_size"]}
        ray_metrics.WORKERS.set(len(self._nodes), run=self.run)
        self._emit(f"rank {fields['rank']} on {fields['node']}", "rank", logging.DEBUG, fields)

    def _add_worker_time(self) -> None:
        now_s = self._clock()
        self._worker_s += len(self._nodes) * (now_s - self._counted_s)
        self._counted_s = now_s

    def _begin(self, fields: dict[str, Any]) -> None:
        first_step, total_steps = fields["first_step"], fields["total_steps"]
        if self.starts:
            self._repeated_steps += max(self._last_step + 1 - first_step, 0)
        self.starts += 1
        self._last_step = first_step - 1
        ray_metrics.STARTS.add(1, run=self.run)
        ray_metrics.TOTAL_STEPS.set(total_steps, run=self.run)
        ray_metrics.STEP.set(first_step, run=self.run)
        text = f"start {self.starts} of the workers, at step {first_step} of {total_steps}"
        self._emit(text, "begin", logging.DEBUG if self.starts == 1 else logging.WARNING, fields)
        if self._progress is None:
            self._progress = ProgressView(f"train {self.run}", total_steps, done=first_step).__enter__()
        else:
            self._progress.update(first_step)

    def _step(self, fields: dict[str, Any]) -> None:
        self._speed.add(fields["step"] - self._last_step, fields)
        self._last_step = fields["step"]
        self._set(_STEP_METRICS, fields)
        ray_metrics.STEP.set(fields["step"] + 1, run=self.run)
        self._emit(f"step {fields['step']}, {_note(fields)}", "step", logging.DEBUG, fields)
        if self._progress is not None:
            epoch = f"epoch {fields['epoch'] + 1}/{self._config.train.epochs}, {fields['images_per_s']:.0f} images/s"
            self._progress.update(fields["step"] + 1, _note(fields), short=epoch, panel=self._panel)

    def _evaluated(self, fields: dict[str, Any]) -> None:
        self._set(self._gauges, fields)
        score = self._metrics.score(fields)
        measured = "" if score is None else f", {self._metrics.text(score)}"
        level = logging.DEBUG if score is None else logging.INFO
        self._emit(f"epoch {fields['epoch']}{measured}", "eval", level, fields)

    def _set(self, gauges: dict[str, ray_metrics.Gauge], fields: dict[str, Any]) -> None:
        for name, gauge in gauges.items():
            if fields.get(name) is not None:
                self._latest[name] = fields[name]
                gauge.set(fields[name], run=self.run, **ray_metrics.head_label(name))

    def _panel(self) -> Table:
        """The latest values, for a terminal."""
        table = Table(box=None, pad_edge=False)
        for name in (*self._latest, "starts", "ranks"):
            table.add_column(name.replace("_", " "), justify="right")
        table.add_row(*(f"{value:.4g}" for value in self._latest.values()), str(self.starts), str(len(self._nodes)))
        return table

    def _log_summary(self) -> None:
        """Also of a training that failed."""
        if not self.starts:
            return
        ranks, ray = Counter(self._nodes.values()), self._config.ray
        for node, count in sorted(ranks.items()):
            share = self._speed.images_per_s * count / len(self._nodes)
            fields = {"node": node, "ranks": count, "images_per_s": round(share, 2)}
            self._emit(f"{node}: {counted(count, 'rank')}, {share:.0f} images/s", "node", logging.INFO, fields)
        worker_hours = self._worker_s / 3600
        cost = {
            "worker_hours": worker_hours,
            "cpu_hours": worker_hours * ray.cpus_per_worker,
            "gpu_hours": worker_hours * ray.use_gpu,
        }
        repeated = f" ({counted(self._repeated_steps, 'step')} repeated)" if self._repeated_steps else ""
        text = (
            f"{counted(len(ranks), 'node')}, {counted(self.starts, 'start')}{repeated}, "
            f"{self._speed.images_per_s:.0f} images/s, "
            f"{self._speed.data_wait:.0%} waiting for data; {cost['worker_hours']:.3g} worker-hours, "
            f"which reserved {cost['cpu_hours']:.3g} CPU-hours and {cost['gpu_hours']:.3g} GPU-hours"
        )
        rounded = {name: round(value, 6) for name, value in cost.items()}
        speed = {"images_per_s": round(self._speed.images_per_s, 2), "data_wait": round(self._speed.data_wait, 4)}
        counts = {"nodes": len(ranks), "starts": self.starts, "repeated_steps": self._repeated_steps}
        self._emit(text, "summary", logging.INFO, {**counts, **speed, **rounded})


def _note(fields: dict[str, Any]) -> str:
    speed = f"{fields['images_per_s']:.0f} images/s"
    if "views_per_s" in fields:
        speed += f" in {fields['views_per_s']:.0f} views/s"
    return f"loss {fields['loss']:.4f}, {speed}, {fields['data_wait']:.0%} waiting for data"


class _MeanSpeed:
    """Mean speed over all steps of a training, without evaluations."""

    def __init__(self, images_per_step: int) -> None:
        self._images_per_step = images_per_step
        self._images, self._seconds, self._wait_s = 0.0, 0.0, 0.0

    def add(self, num_steps: int, fields: dict[str, Any]) -> None:
        images = num_steps * self._images_per_step
        seconds = images / max(fields["images_per_s"], 1e-9)
        self._images += images
        self._seconds += seconds
        self._wait_s += seconds * fields["data_wait"]

    @property
    def images_per_s(self) -> float:
        return self._images / max(self._seconds, 1e-9)

    @property
    def data_wait(self) -> float:
        return self._wait_s / max(self._seconds, 1e-9)
