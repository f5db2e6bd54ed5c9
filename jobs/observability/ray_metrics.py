"""Ray metrics of a job. Ray's agent on the driver's node serves them to Prometheus, as ``ray_stillroom_…``.

Only the driver records them: it receives the events of every task and every step, and no series of a lost worker
remains. Without Ray nothing is recorded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import ray
from ray.util import metrics as meters

if TYPE_CHECKING:
    from pipeline.student.evaluation.metrics import MetricSet

_PREFIX = "stillroom_"


@dataclass(frozen=True)
class _Metric:
    """``exported`` is the name in Prometheus."""

    name: str
    text: str
    tags: tuple[str, ...]


class Counter(_Metric):
    """A metric that only grows."""

    @property
    def exported(self) -> str:
        return f"ray_{_PREFIX}{self.name}_total"

    def add(self, amount: float, **tags: str) -> None:
        # Ray refuses an increment of 0.
        if amount > 0 and ray.is_initialized():
            _ray_metric(meters.Counter, self).inc(amount, tags)


class Gauge(_Metric):
    """A metric that rises and falls."""

    @property
    def exported(self) -> str:
        return f"ray_{_PREFIX}{self.name}"

    def set(self, value: float, **tags: str) -> None:
        if ray.is_initialized():
            _ray_metric(meters.Gauge, self).set(value, tags)


@cache
def _ray_metric(kind: Any, metric: _Metric) -> Any:
    """The metric of Ray, which refuses a second one of the same name."""
    return kind(_PREFIX + metric.name, metric.text, metric.tags)


# The last name of the URL of a cache or a run.
_CACHE, _CACHE_NODE, _RUN = ("cache",), ("cache", "node"), ("run",)

IMAGES = Counter("build_images", "Views for which the teacher produced outputs: images times views.", _CACHE_NODE)
BYTES = Counter("build_written_bytes", "Bytes of committed parts.", _CACHE_NODE)
TASK_SECONDS = Counter("build_task_seconds", "Seconds of work on finished parts.", _CACHE_NODE)
TEACHER_SECONDS = Counter("build_teacher_busy_seconds", "Of these, seconds in which the teacher computed.", _CACHE_NODE)
PARTS_DONE = Counter("build_parts_done", "Parts built.", _CACHE_NODE)
PARTS_RETRIED = Counter("build_parts_retried", "Attempts that failed and are retried.", ("cache", "kind"))
PARTS_FAILED = Counter("build_parts_failed", "Parts that failed permanently.", _CACHE)
SHARDS = Gauge("build_shards", "Shards of the whole cache.", _CACHE)
SHARDS_DONE = Gauge("build_shards_done", "Shards all of whose parts are committed.", _CACHE)
SHARDS_RETRIED = Gauge("build_shards_retried", "Shards with a retried attempt.", _CACHE)
SHARDS_FAILED = Gauge("build_shards_failed", "Shards with a part that failed permanently.", _CACHE)

STARTS = Counter("train_starts", "Starts of the workers: one, and one more for each recovery.", _RUN)
WORKERS = Gauge("train_workers", "Ranks that train.", _RUN)
STEP = Gauge("train_step", "Optimiser steps done.", _RUN)
TOTAL_STEPS = Gauge("train_total_steps", "Optimiser steps of the whole run.", _RUN)
EPOCH = Gauge("train_epoch", "Epoch of the last step, from 0.", _RUN)
LOSS = Gauge("train_loss", "Loss of the last step that was read.", _RUN)
LEARNING_RATE = Gauge("train_learning_rate", "Learning rate of that step.", _RUN)
IMAGES_PER_S = Gauge(
    "train_images_per_second", "Images per second over all ranks, between the last two steps that were read.", _RUN
)
DATA_WAIT = Gauge("train_data_wait_share", "Share of the main rank's time spent waiting for data, 0 to 1.", _RUN)


def evaluation_gauges(metrics: MetricSet) -> dict[str, Gauge]:
    """The gauges of a task's metrics, by their keys; metrics of several heads with the same name share one."""
    return {
        metric.key: _evaluation_gauge(metric.key, metric.gauge)
        for metric in metrics.metrics
        if metric.gauge is not None
    }


def _evaluation_gauge(key: str, text: str) -> Gauge:
    head, _, name = key.rpartition("/")
    return Gauge(f"train_head_{name}", text, (*_RUN, "head")) if head else Gauge(f"train_{name}", text, _RUN)


def head_label(key: str) -> dict[str, str]:
    """The label for the head of a key ``HEAD/NAME``; none for ``NAME``."""
    head = key.rpartition("/")[0]
    return {"head": head} if head else {}
