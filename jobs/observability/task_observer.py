"""Logs every attempt of every task of a fan-out, as it happens."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs.observability.log import emit, is_enabled
from jobs.ray.cluster import node_name
from pipeline.core.errors import StillroomError


@dataclass(frozen=True, slots=True)
class AttemptStats:
    """The duration and the node of an attempt; for a lost attempt, None or the node that Ray names."""

    node: str | None
    seconds: float

    @classmethod
    def since(cls, began: float) -> AttemptStats:
        """``began`` by ``time.monotonic`` of this process."""
        return cls(node_name(), time.monotonic() - began)


@dataclass(frozen=True, slots=True)
class AttemptLabel:
    """The name of an attempt in every line about it, of the driver and of its worker."""

    job: str
    item: str
    attempt: int
    fields: dict[str, object]

    def emit(self, event: str, text: str, level: int, stats: AttemptStats | None = None, **more: object) -> None:
        if not is_enabled(level):
            return
        fields = {"job": self.job, "attempt": self.attempt, **self.fields}
        if stats is not None:
            fields |= {} if stats.node is None else {"node": stats.node}
            fields["seconds"] = round(stats.seconds, 3)
        emit(f"{self.job}: {self.item}: {text}", event=event, level=level, **fields, **more)

    def emit_begin(self) -> None:
        """In its worker: the last line of a worker that died names the attempt."""
        node = node_name()
        self.emit("began", f"attempt {self.attempt} began on {node}", logging.INFO, node=node)

    def emit_end(self, stats: AttemptStats, error: StillroomError | None = None) -> None:
        """In its worker."""
        outcome, more = ("done", {}) if error is None else (f"failed: {error.what}", {"error": str(error)})
        text = f"attempt {self.attempt} ended after {stats.seconds:.1f} s on {stats.node}, {outcome}"
        self.emit("ended", text, logging.INFO, stats, **more)


class TaskObserver:
    """Logs every attempt and counts retries by kind.

    Args:
        name: the name of an item in messages.
    """

    def __init__(self, title: str, name: Callable[[Any], str] = str) -> None:
        self.title, self.name = title, name
        self.retries: Counter[str] = Counter()

    def label(self, item: Any, attempt: int) -> AttemptLabel:
        return AttemptLabel(self.title, self.name(item), attempt, self.fields(item))

    def fields(self, item: Any) -> dict[str, object]:
        """The fields that identify an item in JSON."""
        return {"item": self.name(item)}

    def done(self, item: Any, result: Any, stats: AttemptStats, *, attempt: int) -> None:  # noqa: ARG002 - for subclasses
        if is_enabled(logging.DEBUG):
            text = f"done in {stats.seconds:.1f} s on {stats.node}"
            self.label(item, attempt).emit("done", text, logging.DEBUG, stats)

    def retried(
        self, item: Any, error: StillroomError, stats: AttemptStats, *, attempt: int, kind: str, pause_s: float
    ) -> None:
        """``attempt`` failed, and the next one follows after the pause."""
        text = f"attempt {attempt} failed{_on(stats)} ({kind}); retry in {pause_s:.0f} s"
        more = {"kind": kind, "error": str(error), "pause_s": pause_s}
        self.label(item, attempt).emit("retried", text, logging.WARNING, stats, **more)
        self.retries[kind] += 1

    def failed(self, item: Any, error: StillroomError, stats: AttemptStats, *, attempt: int) -> None:
        """Permanently. The error itself is shown when the other items are done."""
        text = f"failed permanently in attempt {attempt}{_on(stats)}: {error.what}"
        self.label(item, attempt).emit("failed", text, logging.ERROR, stats, error=str(error))


def _on(stats: AttemptStats) -> str:
    return "" if stats.node is None else f" on {stats.node}"
