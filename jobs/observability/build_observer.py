"""Observes the parts of a build: progress by node, metrics, and a summary at the end."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from jobs.observability import ray_metrics
from jobs.observability.log import counted, emit
from jobs.observability.task_observer import AttemptStats, TaskObserver
from pipeline import storage
from pipeline.cache.build.part import PartTask
from pipeline.core.errors import StillroomError
from pipeline.core.redaction import redact
from pipeline.shards.omissions import Omissions
from pipeline.shards.shard_urls import shard_id
from schemas.cache_format import Commit
from schemas.config import Config

# More nodes would fill a terminal, and hide the end of a log.
_MAX_NODES = 12


@dataclass(frozen=True, slots=True)
class BuiltPart:
    """A part, the seconds in which the teacher computed, and the members that reading its shard left out."""

    commit: Commit
    busy_s: float
    omissions: Omissions = field(default_factory=Omissions)

    @property
    def num_images(self) -> int:
        return self.commit.written * len(self.commit.views)


@dataclass(slots=True)
class NodeSums:
    """Sums over the parts that one node built. ``began_s`` and ``ended_s`` by the driver's clock."""

    began_s: float
    ended_s: float = 0.0
    parts: int = 0
    images: int = 0
    size_bytes: int = 0
    seconds: float = 0.0
    busy_s: float = 0.0

    def add(self, built: BuiltPart, seconds: float, *, now_s: float) -> None:
        # Parts of one node overlap: the first to end need not be the first to begin.
        self.began_s, self.ended_s = min(self.began_s, now_s - seconds), now_s
        self.parts += 1
        self.images += built.num_images
        self.size_bytes += built.commit.part.size_bytes
        self.seconds += seconds
        self.busy_s += built.busy_s

    @property
    def present_s(self) -> float:
        """From the beginning of the node's first part to the end of its last."""
        return max(self.ended_s - self.began_s, 0.0)

    @property
    def images_per_s(self) -> float:
        return self.images / max(self.present_s, 1e-9)

    @property
    def busy_share(self) -> float:
        return self.busy_s / max(self.seconds, 1e-9)


def part_name(task: PartTask) -> str:
    """The name of a part in messages."""
    return f"{redact(task.shard_url)}, {task.block.name}"


class BuildObserver(TaskObserver):
    """Observes the parts of one build.

    Args:
        tasks: the parts to build.
        num_shards: shards of the whole cache.
    """

    def __init__(
        self,
        config: Config,
        tasks: Iterable[PartTask],
        *,
        num_shards: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__("cache", part_name)
        assert config.cache is not None
        self.cache = storage.last_name(config.cache.url)
        self.nodes: dict[str, NodeSums] = {}
        self.num_failed, self._lost_s = 0, 0.0
        self._ray, self._clock, self.total = config.ray, clock, NodeSums(clock())
        self._num_shards = num_shards
        # Parts that are not built yet, by shard.
        self._open_parts = Counter(shard_id(task.shard_url) for task in tasks)
        self._retried_shards: set[str] = set()
        self._failed_shards: set[str] = set()

    def begin(self) -> None:
        """Sets the metrics before the first part; inside ``cluster``."""
        ray_metrics.SHARDS.set(self._num_shards, cache=self.cache)
        self._set_shards()

    def fields(self, item: PartTask) -> dict[str, object]:
        return {"cache": self.cache, "shard": shard_id(item.shard_url), "part": item.block.name}

    def done(self, item: PartTask, result: BuiltPart, stats: AttemptStats, *, attempt: int) -> None:
        super().done(item, result, stats, attempt=attempt)
        self._add(stats, result)
        shard = shard_id(item.shard_url)
        self._open_parts[shard] -= 1
        if not self._open_parts[shard]:
            del self._open_parts[shard]
        self._set_shards()

    def retried(
        self, item: PartTask, error: StillroomError, stats: AttemptStats, *, attempt: int, kind: str, pause_s: float
    ) -> None:
        super().retried(item, error, stats, attempt=attempt, kind=kind, pause_s=pause_s)
        self._lost_s += stats.seconds
        self._retried_shards.add(shard_id(item.shard_url))
        ray_metrics.PARTS_RETRIED.add(1, cache=self.cache, kind=kind)
        self._set_shards()

    def failed(self, item: PartTask, error: StillroomError, stats: AttemptStats, *, attempt: int) -> None:
        super().failed(item, error, stats, attempt=attempt)
        self._lost_s += stats.seconds
        self.num_failed += 1
        self._failed_shards.add(shard_id(item.shard_url))
        ray_metrics.PARTS_FAILED.add(1, cache=self.cache)
        self._set_shards()

    def _add(self, stats: AttemptStats, built: BuiltPart) -> None:
        assert stats.node is not None
        now_s = self._clock()
        node = self.nodes.setdefault(stats.node, NodeSums(now_s))
        for sums in (node, self.total):
            sums.add(built, stats.seconds, now_s=now_s)
        where = {"cache": self.cache, "node": stats.node}
        ray_metrics.PARTS_DONE.add(1, **where)
        ray_metrics.IMAGES.add(built.num_images, **where)
        ray_metrics.BYTES.add(built.commit.part.size_bytes, **where)
        ray_metrics.TASK_SECONDS.add(stats.seconds, **where)
        ray_metrics.TEACHER_SECONDS.add(built.busy_s, **where)

    def _set_shards(self) -> None:
        ray_metrics.SHARDS_DONE.set(self._num_shards - len(self._open_parts), cache=self.cache)
        ray_metrics.SHARDS_RETRIED.set(len(self._retried_shards), cache=self.cache)
        ray_metrics.SHARDS_FAILED.set(len(self._failed_shards), cache=self.cache)

    def note(self) -> str:
        """The state of the build in a few words."""
        problems = [f"{self.retries.total()} retried"] if self.retries else []
        problems += [f"{self.num_failed} failed"] if self.num_failed else []
        rate = f"{self.total.images_per_s:.0f} images/s"
        return ", ".join([rate, f"teacher {self.total.busy_share:.0%} busy", *problems])

    def panel(self) -> Table:
        """The nodes that finished a part last, for a terminal."""
        table = Table(box=None, pad_edge=False)
        table.add_column("node")
        for name in ("parts", "images", "images/s", "teacher busy", "MB"):
            table.add_column(name, justify="right")
        for name, node in self._latest():
            table.add_row(
                name,
                str(node.parts),
                str(node.images),
                f"{node.images_per_s:.0f}",
                f"{node.busy_share:.0%}",
                f"{node.size_bytes / 1e6:.1f}",
            )
        return table

    def _latest(self) -> list[tuple[str, NodeSums]]:
        return sorted(sorted(self.nodes.items(), key=lambda item: item[1].ended_s, reverse=True)[:_MAX_NODES])

    def log_summary(self) -> None:
        """Logs the work of each node and its cost in hours, also of a build that failed."""
        if not self.nodes and not self._lost_s:
            return
        # Resources were reserved for lost attempts too.
        lost, hours = self._lost_s / 3600, (self.total.seconds + self._lost_s) / 3600
        cost = {
            "node_hours": sum(node.present_s for node in self.nodes.values()) / 3600,
            "cpu_hours": hours * self._ray.cpus_per_task,
            "gpu_hours": hours * self._ray.gpus_per_task,
            "lost_task_hours": lost,
        }
        for name, node in sorted(self.nodes.items()):
            text = (
                f"cache: {name}: {counted(node.parts, 'part')}, {node.images} images, "
                f"{node.images_per_s:.0f} images/s, teacher {node.busy_share:.0%} busy, {node.present_s / 3600:.3g} h"
            )
            level = logging.INFO if len(self.nodes) <= _MAX_NODES else logging.DEBUG
            emit(text, event="node", level=level, cache=self.cache, node=name, **_json_fields(node))
        text = (
            f"cache: {counted(len(self.nodes), 'node')}, {self.note()}; "
            f"{cost['node_hours']:.3g} node-hours of work, for which tasks reserved "
            f"{cost['cpu_hours']:.3g} CPU-hours and {cost['gpu_hours']:.3g} GPU-hours"
        )
        if lost:
            text += f", {lost / hours:.1%} of them in attempts that failed"
        attempts = {"retried": self.retries.total(), "failed": self.num_failed}
        fields: dict[str, Any] = {**_json_fields(self.total), **attempts, **_rounded(cost)}
        emit(text, event="summary", cache=self.cache, nodes=len(self.nodes), **fields)


def _json_fields(node: NodeSums) -> dict[str, object]:
    counts = {"parts": node.parts, "images": node.images, "size_bytes": node.size_bytes}
    measured = {
        "images_per_s": node.images_per_s,
        "teacher_busy": node.busy_share,
        "hours": node.present_s / 3600,
        "task_hours": node.seconds / 3600,
    }
    return {**counts, **_rounded(measured)}


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in values.items()}
