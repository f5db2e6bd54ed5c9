"""Tells of every attempt of every task of a fan-out, as it happens."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs.log import is_told, tell
from jobs.ray_runtime import node_name
from pipeline.errors import StillroomError


@dataclass(frozen=True, slots=True)
class Spent:
    """What an attempt that came back took, and where."""

    node: str
    seconds: float

    @classmethod
    def since(cls, began: float) -> Spent:
        """``began`` by ``time.monotonic`` of this process."""
        return cls(node_name(), time.monotonic() - began)


class Tally:
    """Tells of every attempt. A failure has a node where its worker could still say so."""

    def __init__(self, title: str, name: Callable[[Any], str] = str) -> None:
        self.title, self._name = title, name
        self.retries: Counter[str] = Counter()

    def fields(self, item: Any) -> dict[str, object]:
        """What names an item in a log that machines read."""
        return {"item": self._name(item)}

    def done(self, item: Any, result: Any, spent: Spent, *, attempt: int) -> None:  # noqa: ARG002 - for who counts it
        self._tell(item, "done", f"done in {spent.seconds:.1f} s on {spent.node}", logging.DEBUG, attempt, spent)

    def retried(
        self, item: Any, error: StillroomError, spent: Spent | None, *, attempt: int, kind: str, pause_s: float
    ) -> None:
        """``attempt`` failed and another one follows after the pause."""
        text = f"attempt {attempt} failed ({kind}); again in {pause_s:.0f} s"
        more = {"kind": kind, "error": str(error), "pause_s": pause_s}
        self._tell(item, "retried", text, logging.WARNING, attempt, spent, **more)
        self.retries[kind] += 1

    def failed(self, item: Any, error: StillroomError, spent: Spent | None, *, attempt: int) -> None:
        """For good. The error is told in full when the others are done."""
        text = f"failed for good in attempt {attempt}: {error.what}"
        self._tell(item, "failed", text, logging.ERROR, attempt, spent, error=str(error))

    def _tell(
        self, item: Any, event: str, text: str, level: int, attempt: int, spent: Spent | None, **more: object
    ) -> None:
        if not is_told(level):
            return
        where = {} if spent is None else {"node": spent.node, "seconds": round(spent.seconds, 3)}
        told = f"{self.title}: {self._name(item)}: {text}"
        tell(told, event=event, level=level, job=self.title, attempt=attempt, **self.fields(item), **where, **more)
