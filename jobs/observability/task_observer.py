"""Tells of every attempt of every task of a fan-out, as it happens."""

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
    """What an attempt took, and where: for one that did not come back, where Ray says it."""

    node: str | None
    seconds: float

    @classmethod
    def since(cls, began: float) -> AttemptStats:
        """``began`` by ``time.monotonic`` of this process."""
        return cls(node_name(), time.monotonic() - began)


@dataclass(frozen=True, slots=True)
class AttemptLabel:
    """An attempt as it is called in every line about it: the driver's, and its worker's own."""

    job: str
    item: str
    attempt: int
    fields: dict[str, object]

    def emit(self, event: str, text: str, level: int, stats: AttemptStats | None = None, **more: object) -> None:
        if not is_enabled(level):
            return
        where = {} if stats is None or stats.node is None else {"node": stats.node}
        took = {} if stats is None else {"seconds": round(stats.seconds, 3)}
        told = f"{self.job}: {self.item}: {text}"
        emit(told, event=event, level=level, job=self.job, attempt=self.attempt, **self.fields, **where, **took, **more)

    def emit_begin(self) -> None:
        """In its worker, whose log would otherwise not say what it died of."""
        node = node_name()
        self.emit("began", f"attempt {self.attempt} began on {node}", logging.INFO, node=node)

    def emit_end(self, stats: AttemptStats, error: StillroomError | None = None) -> None:
        """In its worker."""
        became, more = ("done", {}) if error is None else (f"failed: {error.what}", {"error": str(error)})
        text = f"attempt {self.attempt} ended after {stats.seconds:.1f} s on {stats.node}, {became}"
        self.emit("ended", text, logging.INFO, stats, **more)


class TaskObserver:
    """Tells of every attempt. One that was lost has a node where Ray says which one."""

    def __init__(self, title: str, name: Callable[[Any], str] = str) -> None:
        self.title, self._name = title, name
        self.retries: Counter[str] = Counter()

    def label(self, item: Any, attempt: int) -> AttemptLabel:
        return AttemptLabel(self.title, self._name(item), attempt, self.fields(item))

    def fields(self, item: Any) -> dict[str, object]:
        """What names an item in a log that machines read."""
        return {"item": self._name(item)}

    def done(self, item: Any, result: Any, stats: AttemptStats, *, attempt: int) -> None:  # noqa: ARG002 - for who counts it
        if is_enabled(logging.DEBUG):
            text = f"done in {stats.seconds:.1f} s on {stats.node}"
            self.label(item, attempt).emit("done", text, logging.DEBUG, stats)

    def retried(
        self, item: Any, error: StillroomError, stats: AttemptStats, *, attempt: int, kind: str, pause_s: float
    ) -> None:
        """``attempt`` failed and another one follows after the pause."""
        text = f"attempt {attempt} failed{_on(stats)} ({kind}); again in {pause_s:.0f} s"
        more = {"kind": kind, "error": str(error), "pause_s": pause_s}
        self.label(item, attempt).emit("retried", text, logging.WARNING, stats, **more)
        self.retries[kind] += 1

    def failed(self, item: Any, error: StillroomError, stats: AttemptStats, *, attempt: int) -> None:
        """For good. The error is told in full when the others are done."""
        text = f"failed for good in attempt {attempt}{_on(stats)}: {error.what}"
        self.label(item, attempt).emit("failed", text, logging.ERROR, stats, error=str(error))


def _on(stats: AttemptStats) -> str:
    return "" if stats.node is None else f" on {stats.node}"
