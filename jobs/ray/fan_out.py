"""Apply a function to many independent items, as Ray tasks or as a plain loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from jobs.observability.task_observer import AttemptStats, TaskObserver
from jobs.ray.cluster import cluster
from jobs.ray.task_scheduler import LostTaskError, TaskScheduler
from pipeline.core.errors import ShardError, StillroomError, TransientStorageError
from schemas.config import RayConfig

T = TypeVar("T")
R = TypeVar("R")
# More failures than these have a common cause, and each item may cost all its retries.
_MAX_FAILURES = 16
# These faults concern one item: a damaged shard, or a node that died.
_ITEM_ERRORS = (ShardError, TransientStorageError, LostTaskError)


def fan_out(
    work: Callable[[T], R],
    items: Iterable[T],
    config: RayConfig,
    *,
    what: str,
    name: Callable[[T], str] = str,
    observer: TaskObserver | None = None,
    reports_silence: bool = True,
) -> Iterator[tuple[T, R]]:
    """Each item with its result, in the order of completion.

    About two tasks a slot are in flight: enough to keep every worker busy and to show an autoscaler the demand, few
    enough that the driver's memory does not grow with the number of items.

    Args:
        items: consumed as tasks start.
        what: the kind of task, for the error that no node has room for one.
        name: the name of an item in messages; unused with an ``observer``.
        observer: receives every attempt.
        reports_silence: False for items that take hours.

    Raises:
        StillroomError: an item failed permanently. If the fault concerns that item alone (a damaged shard, retries used
            up), all other items are finished first, and one error lists all failures. Any other fault ends the work
            at once.

    Tasks in flight then end with the driver's connection. They are not cancelled: in Ray 2.60 a cancellation that
    races with the task's result aborts the driver (task_manager.cc, "Tried to complete task that was not pending").
    """
    failures, observer = _Failures(), observer or TaskObserver(what, name)
    if config.address == "none":
        yield from _loop(work, items, failures, observer)
    else:
        with cluster(config):
            scheduler = TaskScheduler(work, config, what, failures.add, observer, reports_silence=reports_silence)
            yield from scheduler.run(items)
    failures.raise_all("the others are done")


def _loop(
    work: Callable[[T], R], items: Iterable[T], failures: _Failures, observer: TaskObserver
) -> Iterator[tuple[T, R]]:
    for item in items:
        began = time.monotonic()
        try:
            result = work(item)
        except StillroomError as error:
            observer.failed(item, error, AttemptStats.since(began), attempt=1)
            failures.add(error)
        else:
            observer.done(item, result, AttemptStats.since(began), attempt=1)
            yield item, result


class _Failures:
    """Permanent failures of single items. The blocks of a shard fail with equal messages, which count once."""

    def __init__(self) -> None:
        self._by_text: dict[str, StillroomError] = {}

    def add(self, error: StillroomError) -> None:
        """
        Raises:
            StillroomError: this fault, or the number of failures, ends the work.
        """
        if not isinstance(error, _ITEM_ERRORS):
            raise error
        self._by_text[str(error)] = error
        if len(self._by_text) > _MAX_FAILURES:
            self.raise_all("stopped there")

    def raise_all(self, outcome: str) -> None:
        errors = sorted(self._by_text.values(), key=str)
        if len(errors) == 1:
            raise errors[0]
        if errors:
            # A possibly temporary failure (exit code 1) is worth another run, so it decides the exit code.
            kind = type(min(errors, key=lambda error: error.exit_code))
            raise kind(
                f"{len(errors)} failures; {outcome}",
                code="ray.several-failures",
                got="".join(f"\n- {error}".replace("\n", "\n    ") for error in errors),
                next_step="fix each cause; then run the command again: it does only what is missing",
            )
