"""Run many independent pieces of work: as Ray tasks with bounded flight and counted retries, or as a plain loop."""

from __future__ import annotations

import faulthandler
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray.exceptions import NodeDiedError, RayError, RayTaskError, RuntimeEnvSetupError, WorkerCrashedError

from jobs.observability.log import emit
from jobs.observability.task_observer import AttemptLabel, AttemptStats, TaskObserver
from jobs.ray.cluster import amounts, cluster, node_of, node_wait_s, require_resources, slots, task_resources
from pipeline.core.errors import LostGpuError, ShardError, StillroomError, StorageError, TransientStorageError
from schemas.config import RayConfig

T = TypeVar("T")
R = TypeVar("R")
_BACKOFF_S, _MAX_BACKOFF_S = 1.0, 30.0
# More than this is no longer a few bad shards among good ones, and each may cost its retries.
_MAX_FAILURES = 16
# A node that was taken away is rarely its part's fault. One that takes its node along each time must still come to an
# end: so often ray.max_retries.
_NODE_TIMES = 5
_LOOK_EVERY_S = 1.0
_MAX_NAMES = 1000
# Silence is reported after this time, and not before so many times what the longest part took that is done.
_SILENT_AFTER_S, _SILENT_TIMES = 300.0, 3


class LostTaskError(StorageError):
    """A worker or node that died with its task. As passing as a storage that failed, and retried as often."""

    code = "ray.task-lost"


# One damaged shard, or one node's bad luck, says nothing about the other items.
_OF_ONE_ITEM = (ShardError, TransientStorageError, LostTaskError)


# max_calls=0 keeps the worker process, and with it the loaded model, from task to task also on GPUs, where Ray would
# start a new process for each. max_retries=0: Ray's own retries are unbounded for some failures, so they are ours.
@ray.remote(max_retries=0, max_calls=0)
def _call(
    work: Callable[[Any], Any], item: Any, label: AttemptLabel, timeout_s: float | None = None
) -> tuple[Any, StillroomError | None, AttemptStats]:
    began = time.monotonic()
    label.emit_begin()
    with _ended_after(timeout_s):
        return _attempt(work, item, label, began)


@contextmanager
def _ended_after(timeout_s: float | None) -> Generator[None]:
    """Ends this process when the time is over, with the stacks of its threads in the worker's log.

    Its clock is a thread of C, which needs no GIL: a teacher that hangs in a library may hold it.
    """
    if timeout_s is None:
        yield
        return
    faulthandler.dump_traceback_later(timeout_s, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _attempt(
    work: Callable[[Any], Any], item: Any, label: AttemptLabel, began: float
) -> tuple[Any, StillroomError | None, AttemptStats]:
    result: Any = None
    failure: StillroomError | None = None
    # Returned, not raised: Ray would wrap it in an exception of its own making.
    try:
        result = work(item)
    except LostGpuError as error:
        label.emit_end(AttemptStats.since(began), error)
        # This process will never see its new GPU: it ends, frees what it holds of the old one, and counts as lost.
        sys.exit(str(error))
    except StillroomError as error:
        failure = error
    stats = AttemptStats.since(began)
    label.emit_end(stats, failure)
    return result, failure, stats


def fan_out(
    work: Callable[[T], R],
    items: Iterable[T],
    config: RayConfig,
    *,
    what: str,
    name: Callable[[T], str] = str,
    tally: TaskObserver | None = None,
    reports_silence: bool = True,
) -> Iterator[tuple[T, R]]:
    """Each item with its result, in the order of completion.

    About two tasks a slot are in flight: enough to keep every worker busy and to show an autoscaler what is waiting,
    few enough that the driver's memory does not grow with the number of items. ``items`` is drawn as they start.
    ``what`` is for the message that tasks of this kind fit nowhere, ``name`` for one about a single item. ``tally``
    hears of every attempt. ``reports_silence`` is False for items that take hours.

    Raises:
        StillroomError: an item failed for good. Where that says nothing about others (a damaged shard, retries that
            were used up) they are finished first, and one error names all that failed; any other failure ends
            everything at once.

    What is in flight then ends with the driver's connection. It is not cancelled: in Ray 2.60 a cancellation that meets
    the task's own answer aborts the driver (task_manager.cc, "Tried to complete task that was not pending").
    """
    failures, tally = _Failures(), tally or TaskObserver(what, name)
    if config.address == "none":
        yield from _loop(work, items, failures, tally)
    else:
        with cluster(config):
            yield from _TaskScheduler(work, config, what, name, failures, tally, reports_silence=reports_silence).run(
                items
            )
    failures.raise_any("the others are done")


def _loop(
    work: Callable[[T], R], items: Iterable[T], failures: _Failures, tally: TaskObserver
) -> Iterator[tuple[T, R]]:
    for item in items:
        began = time.monotonic()
        try:
            result = work(item)
        except StillroomError as error:
            tally.failed(item, error, AttemptStats.since(began), attempt=1)
            failures.add(error)
        else:
            tally.done(item, result, AttemptStats.since(began), attempt=1)
            yield item, result


class _Failures:
    """What failed for good while other items went on. Blocks of one shard fail with one message, which counts once."""

    def __init__(self) -> None:
        self._by_text: dict[str, StillroomError] = {}

    def add(self, error: StillroomError) -> None:
        """
        Raises:
            StillroomError: this failure, or that there are so many, speaks against going on.
        """
        if not isinstance(error, _OF_ONE_ITEM):
            raise error
        self._by_text[str(error)] = error
        if len(self._by_text) > _MAX_FAILURES:
            self.raise_any("stopped there")

    def raise_any(self, then: str) -> None:
        errors = sorted(self._by_text.values(), key=str)
        if len(errors) == 1:
            raise errors[0]
        if errors:
            # What passes (exit code 1) may be tried again as it is, so it decides how the whole ended.
            kind = type(min(errors, key=lambda error: error.exit_code))
            raise kind(
                f"{len(errors)} failures; {then}",
                got="".join(f"\n- {error}".replace("\n", "\n    ") for error in errors),
                next_step="see each; then run the command again: it does only what is not done",
            )


@dataclass(slots=True)
class _Attempt:
    """An item on its way, with the failures it has had, by kind."""

    item: Any
    failed: Counter[str] = field(default_factory=Counter)
    not_before: float = 0.0
    launched: float = 0.0
    next_report_s: float = 0.0
    """Seconds since its launch at which its silence is reported next."""

    @property
    def number(self) -> int:
        """From 1."""
        return self.failed.total() + 1


class _TaskScheduler:
    def __init__(
        self,
        work: Callable[[Any], Any],
        config: RayConfig,
        what: str,
        name: Callable[[Any], str],
        failures: _Failures,
        tally: TaskObserver,
        *,
        reports_silence: bool,
    ) -> None:
        self._needed, self._what = task_resources(config), what
        self._where = f"ray.cpus_per_task={config.cpus_per_task}, ray.gpus_per_task={config.gpus_per_task:g}"
        if config.resources_per_task:
            self._where += f", ray.resources_per_task={config.resources_per_task}"
        require_resources(self._needed, what=what, where=self._where, wait_s=config.wait_s)
        # SPREAD, since Ray's default fills half of a node before it takes the next one: few parts would share one
        # node's network while others idle.
        self._options: dict[str, Any] = {
            "num_cpus": config.cpus_per_task,
            "num_gpus": config.gpus_per_task,
            "resources": config.resources_per_task,
            "scheduling_strategy": "SPREAD",
        }
        self._unnamed = _call.options(**self._options)
        self._work = ray.put(work)
        self._node_wait_s = node_wait_s(config)
        self._reports_silence = reports_silence
        self._limit, self._next_look = 0, 0.0
        self._without_nodes_since: float | None = None
        self._max_retries, self._timeout_s = config.max_retries, config.part_timeout_s
        self._name, self._failures, self._tally = name, failures, tally
        self._queued_s, self._longest_s = 0.0, 0.0
        self._num_named = 0
        self._waiting: list[_Attempt] = []
        self._flying: dict[ray.ObjectRef[Any], _Attempt] = {}

    def run(self, items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        fresh = (_Attempt(item) for item in items)
        try:
            while self._launch(fresh):
                # A timeout, so that a retry whose pause is over does not wait for others to finish.
                ready, _ = ray.wait(list(self._flying), num_returns=1, timeout=0.5) if self._flying else ([], [])
                if not self._flying:
                    time.sleep(0.05)
                for reference in ready:
                    yield from self._collect(reference)
                self._report_silence()
        finally:
            if retries := self._tally.retries:
                kinds = ", ".join(f"{count} after {kind}" for kind, count in sorted(retries.items()))
                emit(f"tasks were retried: {kinds}", event="retries", retries=dict(retries))

    def _launch(self, fresh: Iterator[_Attempt]) -> bool:
        """Fills the flight, retries first. False where nothing flies or waits any more."""
        self._follow_nodes()
        while len(self._flying) < self._limit and (attempt := self._next_retry() or next(fresh, None)) is not None:
            attempt.launched = time.monotonic()
            label = self._tally.label(attempt.item, attempt.number)
            task = self._named(label)
            self._flying[task.remote(self._work, attempt.item, label, self._timeout_s)] = attempt
        return bool(self._flying or self._waiting)

    def _named(self, label: AttemptLabel) -> Any:
        """The task under the name of its part, as Ray's dashboard shows it. Ray also makes series of metrics of every
        name, and never drops one, so only so many first attempts have one; every retry has.
        """
        if label.attempt == 1:
            self._num_named += 1
            if self._num_named > _MAX_NAMES:
                return self._unnamed
        return _call.options(**self._options, name=f"{label.job}: {label.item}")

    def _follow_nodes(self) -> None:
        """Nodes come and go while a flight lasts, and its width goes with them.

        Raises:
            LostTaskError: for long there was no node left that could run a task.
        """
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_EVERY_S
        found = slots(self._needed)
        # Without any node two tasks stay in flight, for an autoscaler to see.
        self._limit = 2 * max(1, found)
        if found:
            self._without_nodes_since = None
        elif self._without_nodes_since is None:
            self._without_nodes_since = now
            emit(
                f"no node is left for {self._what} ({amounts(self._needed)}); waiting up to {self._node_wait_s:g} s",
                event="waiting",
                level=logging.WARNING,
            )
        elif now - self._without_nodes_since > self._node_wait_s:
            raise LostTaskError(
                f"every node that could run {self._what} is gone",
                where=self._where,
                got=f"none for {self._node_wait_s:g} s",
                expected=amounts(self._needed),
                next_step="add nodes, then run the command again: finished parts stay",
            )

    def _report_silence(self) -> None:
        """Names the part that was launched first where it takes far longer than all that are done, at ever longer
        intervals. Others wait behind it, launched later: Ray does not tell which of them have begun.
        """
        if not self._flying or not self._reports_silence:
            return
        oldest = min(self._flying.values(), key=lambda attempt: attempt.launched)
        silent_s = time.monotonic() - oldest.launched
        if silent_s < max(oldest.next_report_s, _SILENT_AFTER_S, _SILENT_TIMES * self._longest_s):
            return
        oldest.next_report_s = 2 * silent_s
        ends = "" if self._timeout_s is None else f"; its process is ended after {self._timeout_s:g} s of work"
        text = f"attempt {oldest.number} has given no result for {silent_s:.0f} s{ends}"
        label = self._tally.label(oldest.item, oldest.number)
        label.emit("silent", text, logging.WARNING, silent_s=round(silent_s, 1))

    def _next_retry(self) -> _Attempt | None:
        now = time.monotonic()
        due = next((attempt for attempt in self._waiting if attempt.not_before <= now), None)
        if due is not None:
            self._waiting.remove(due)
        return due

    def _collect(self, reference: ray.ObjectRef[Any]) -> Iterator[tuple[Any, Any]]:
        attempt = self._flying.pop(reference)
        try:
            result, error, stats = ray.get(reference)
        except RayTaskError:
            # Not a StillroomError, so a bug: its traceback is what helps.
            raise
        except RayError as lost:
            self._lose(attempt, lost)
            return
        flown_s = time.monotonic() - attempt.launched
        self._queued_s, self._longest_s = flown_s - stats.seconds, max(self._longest_s, flown_s)
        if error is None:
            self._tally.done(attempt.item, result, stats, attempt=attempt.number)
            yield attempt.item, result
        elif isinstance(error, TransientStorageError):
            self._retry(attempt, error, stats, kind="a failure of storage")
        else:
            self._fail(attempt, error, stats)

    def _lose(self, attempt: _Attempt, lost: RayError) -> None:
        stats = self._spent_of_lost(attempt, lost)
        # Not the estimate of the seconds spent: no timeout may be taken for a crash, which has retries of its own kind.
        flown_s = time.monotonic() - attempt.launched
        if isinstance(lost, WorkerCrashedError) and self._timeout_s is not None and flown_s >= self._timeout_s:
            error = _timed_out(self._name(attempt.item), self._timeout_s, stats.node)
            self._retry(attempt, error, stats, kind="a timeout")
        else:
            self._retry(attempt, _lost(lost, self._name(attempt.item)), stats, kind=type(lost).__name__)

    def _spent_of_lost(self, attempt: _Attempt, lost: RayError) -> AttemptStats:
        """By the driver's clock: since its launch, less what the last one that came back waited for its place."""
        since_s = time.monotonic() - attempt.launched
        return AttemptStats(node_of(lost), max(since_s - self._queued_s, 0.0))

    def _fail(self, attempt: _Attempt, error: StillroomError, stats: AttemptStats) -> None:
        self._tally.failed(attempt.item, error, stats, attempt=attempt.number)
        self._failures.add(error)

    def _retry(self, attempt: _Attempt, error: StillroomError, stats: AttemptStats, *, kind: str) -> None:
        """Each kind has its own count: on nodes that come and go, a lost one must not use up what a storage needs."""
        times = _NODE_TIMES if kind == NodeDiedError.__name__ else 1
        if attempt.failed[kind] == times * self._max_retries:
            self._fail(attempt, error, stats)
            return
        pause_s = min(_BACKOFF_S * 2 ** attempt.failed.total(), _MAX_BACKOFF_S)
        self._tally.retried(attempt.item, error, stats, attempt=attempt.number, kind=kind, pause_s=pause_s)
        attempt.failed[kind] += 1
        attempt.not_before = time.monotonic() + pause_s
        self._waiting.append(attempt)


def _timed_out(name: str, timeout_s: float, node: str | None) -> LostTaskError:
    return LostTaskError(
        "a part did not finish in its time",
        code="ray.part-timeout",
        where=name,
        got=f"no result after {timeout_s:g} s" + ("" if node is None else f" on {node}"),
        expected=f"ray.part_timeout_s={timeout_s:g} at most",
        next_step="see where it hung in the log of its worker (grep -A40 'Timeout (' "
        "/tmp/ray/session_latest/logs/worker-*.err on its node), or raise ray.part_timeout_s; then run the command "
        "again: finished parts stay",
    )


def _lost(error: RayError, name: str) -> LostTaskError:
    lines = str(error).strip().splitlines()
    reason, mend = lines[0], "lower teacher.batch_size or max_pixels"
    if isinstance(error, RuntimeEnvSetupError):
        # The node's traceback, whose last line says why. Nodes keep a failure for as long, and answer with it.
        reason, mend = lines[-1], "mend the job's working directory or requirements, or wait ten minutes"
    return LostTaskError(
        "a worker did not finish its task",
        where=name,
        got=f"{type(error).__name__}: {reason}",
        next_step=f"run the command again: finished parts stay; if it repeats, {mend}",
    )
