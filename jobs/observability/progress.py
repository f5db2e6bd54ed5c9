"""Progress: a bar and a panel in a terminal, a line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from jobs.observability.log import as_json, emit

_LINE_EVERY_S = 10.0
_MAX_TITLE_WIDTH = 16


def duration(seconds: float) -> str:
    """``0.35 s``, ``12 s``, ``3.5 min``, ``1.2 h``, ``2.5 days``."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.2g} {name}"
    return f"{seconds / 86_400:.1f} days"


def _clock(seconds: float) -> str:
    """``26:03:04``: hours, minutes, seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class _Bar(Progress):
    panel: RenderableType | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.panel is not None:
            yield self.panel


class ProgressView:
    """A running count with a note, on standard error, so that results can be piped."""

    def __init__(self, title: str, total: int, *, done: int = 0) -> None:
        self.title, self.total, self.done = title, total, done
        self._first = done
        self._began = self._logged = time.monotonic()
        self._bar: _Bar | None = None
        if sys.stderr.isatty() and not as_json():
            self._bar = _Bar(
                TextColumn("{task.description}", table_column=Column(max_width=_MAX_TITLE_WIDTH, no_wrap=True)),
                # Takes the width that the other columns leave.
                BarColumn(bar_width=None),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[left]}"),
                TextColumn("{task.fields[note]}"),
                expand=True,
                # Log lines appear above the bar.
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(title, total=total, completed=done, note="", left="")

    def __enter__(self) -> ProgressView:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._line("")

    def update(
        self,
        done: int,
        note: str = "",
        *,
        short: str | None = None,
        total: int | None = None,
        panel: Callable[[], RenderableType] | None = None,
    ) -> None:
        """Sets the count.

        Args:
            note: the present state; ``short`` replaces it in a terminal.
            total: replaces the total of the constructor.
            panel: builds what a terminal shows below the bar.
        """
        self.done, self.total = done, self.total if total is None else total
        if self._bar is not None:
            self._bar.panel = self._bar.panel if panel is None else panel()
            left_s = self._left_s()
            left = "" if left_s is None else f"{_clock(left_s)} left"
            self._bar.update(self._task, completed=done, total=self.total, note=short or note, left=left)
        elif time.monotonic() - self._logged >= _LINE_EVERY_S and done < self.total:
            self._logged = time.monotonic()
            self._line(note)

    def _left_s(self) -> float | None:
        """At the rate since the start; rich discards its rate after half a minute without an update."""
        elapsed_s = time.monotonic() - self._began
        rate = (self.done - self._first) / elapsed_s if elapsed_s > 0 else 0.0
        return (self.total - self.done) / rate if rate > 0 and self.done < self.total else None

    def _line(self, note: str) -> None:
        elapsed_s, left_s = time.monotonic() - self._began, self._left_s()
        left = "" if left_s is None else f", {left_s:.0f} s left"
        emit(
            f"{self.title}: {self.done}/{self.total} after {elapsed_s:.0f} s{left} {note}".rstrip(),
            event="progress",
            job=self.title,
            done=self.done,
            total=self.total,
            seconds=round(elapsed_s, 1),
            seconds_left=None if left_s is None else round(left_s),
        )
