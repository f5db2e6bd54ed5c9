"""Tells of every attempt of every task of a fan-out, as it happens."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs.observability.log import is_told, tell
from jobs.ray.cluster import node_name
from pipeline.core.errors import StillroomError


@dataclass(frozen=True, slots=True)
class Spent:
    """What an attempt took, and where: for one that did not come back, where Ray says it."""

    node: str | None
    seconds: float

    @classmethod
    def since(cls, began: float) -> Spent:
        """``began`` by ``time.monotonic`` of this process."""
        return cls(node_name(), time.monotonic() - began)


@dataclass(frozen=True, slots=True)
class Caption:
    """An attempt as it is called in every line about it: the driver's, and its worker's own."""

    job: str
    item: str
    attempt: int
    fields: dict[str, object]

    def tell(self, event: str, text: str, level: int, spent: Spent | None = None, **more: object) -> None:
        if not is_told(level):
            return
        where = {} if spent is None or spent.node is None else {"node": spent.node}
        took = {} if spent is None else {"seconds": round(spent.seconds, 3)}
        told = f"{self.job}: {self.item}: {text}"
        tell(told, event=event, level=level, job=self.job, attempt=self.attempt, **self.fields, **where, **took, **more)

    def tell_begin(self) -> None:
        """In its worker, whose log would otherwise not say what it died of."""
        node = node_name()
        self.tell("began", f"attempt {self.attempt} began on {node}", logging.INFO, node=node)

    def tell_end(self, spent: Spent, error: StillroomError | None = None) -> None:
        """In its worker."""
        became, more = ("done", {}) if error is None else (f"failed: {error.what}", {"error": str(error)})
        text = f"attempt {self.attempt} ended after {spent.seconds:.1f} s on {spent.node}, {became}"
        self.tell("ended", text, logging.INFO, spent, **more)


class Tally:
    """Tells of every attempt. One that was lost has a node where Ray says which one."""

    def __init__(self, title: str, name: Callable[[Any], str] = str) -> None:
        self.title, self._name = title, name
        self.retries: Counter[str] = Counter()

    def caption(self, item: Any, attempt: int) -> Caption:
        return Caption(self.title, self._name(item), attempt, self.fields(item))

    def fields(self, item: Any) -> dict[str, object]:
        """What names an item in a log that machines read."""
        return {"item": self._name(item)}

    def done(self, item: Any, result: Any, spent: Spent, *, attempt: int) -> None:  # noqa: ARG002 - for who counts it
        if is_told(logging.DEBUG):
            text = f"done in {spent.seconds:.1f} s on {spent.node}"
            self.caption(item, attempt).tell("done", text, logging.DEBUG, spent)

    def retried(
        self, item: Any, error: StillroomError, spent: Spent, *, attempt: int, kind: str, pause_s: float
    ) -> None:
        """``attempt`` failed and another one follows after the pause."""
        text = f"attempt {attempt} failed{_on(spent)} ({kind}); again in {pause_s:.0f} s"
        more = {"kind": kind, "error": str(error), "pause_s": pause_s}
        self.caption(item, attempt).tell("retried", text, logging.WARNING, spent, **more)
        self.retries[kind] += 1

    def failed(self, item: Any, error: StillroomError, spent: Spent, *, attempt: int) -> None:
        """For good. The error is told in full when the others are done."""
        text = f"failed for good in attempt {attempt}{_on(spent)}: {error.what}"
        self.caption(item, attempt).tell("failed", text, logging.ERROR, spent, error=str(error))


def _on(spent: Spent) -> str:
    return "" if spent.node is None else f" on {spent.node}"
