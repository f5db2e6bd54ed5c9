"""Ray tasks for many items: bounded in number, retried with counts, spread over nodes that are added and lost."""

from __future__ import annotations

import faulthandler
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import NodeDiedError, RayError, RayTaskError, RuntimeEnvSetupError, WorkerCrashedError

from jobs.observability.log import emit
from jobs.observability.task_observer import AttemptLabel, AttemptStats, TaskObserver
from jobs.ray.cluster import node_of, node_wait_s, num_slots, require_resources, resources_text, task_resources
from pipeline.core.errors import LostGpuError, StillroomError, StorageError, TransientStorageError
from schemas.config import RayConfig

BACKOFF_S = 1.0
_MAX_BACKOFF_S = 30.0
# A lost node is rarely the fault of its part, so it has this many times ``ray.max_retries``. The number is finite for a
# part that takes its node down each time.
_NODE_LOSS_FACTOR = 5
_NODE_CHECK_S = 1.0
MAX_NAMED_TASKS = 1000
# A part is reported as silent after this time, and after this many times the longest time of a finished part.
SILENT_AFTER_S = 300.0
_SILENT_FACTOR = 3


class LostTaskError(StorageError):
    """A worker or node died with its task. Retried like a temporary storage failure."""

    code = "ray.task-lost"


# max_calls=0 keeps the worker process, and with it the loaded model, for further tasks also on GPUs, where Ray would
# start a new process for each. max_retries=0: Ray's own retries are unbounded for some failures.
@ray.remote(max_retries=0, max_calls=0)
def _call(
    work: Callable[[Any], Any], item: Any, label: AttemptLabel, timeout_s: float | None = None
) -> tuple[Any, StillroomError | None, AttemptStats]:
    began = time.monotonic()
    label.emit_begin()
    if timeout_s is not None:
        # Ends this process, with the stacks of its threads in the worker's log. The timer is a thread of C that needs
        # no GIL: a teacher that hangs in a library may hold it.
        faulthandler.dump_traceback_later(timeout_s, exit=True)
    try:
        return _attempt(work, item, label, began)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _attempt(
    work: Callable[[Any], Any], item: Any, label: AttemptLabel, began: float
) -> tuple[Any, StillroomError | None, AttemptStats]:
    result: Any = None
    failure: StillroomError | None = None
    # Returned, not raised: Ray would wrap it in an exception of another class.
    try:
        result = work(item)
    except LostGpuError as error:
        label.emit_end(AttemptStats.since(began), error)
        # This process will never see its new GPU. It exits, frees the memory of the old one, and counts as lost.
        sys.exit(str(error))
    except StillroomError as error:
        failure = error
    stats = AttemptStats.since(began)
    label.emit_end(stats, failure)
    return result, failure, stats


@dataclass(slots=True)
class _Attempt:
    """An item in flight or waiting for a retry, with its failures by kind.

    Attributes:
        launched, not_before: by ``time.monotonic``.
        next_report_s: seconds after its launch at which its silence is reported next.
    """

    item: Any
    failed: Counter[str] = field(default_factory=Counter)
    not_before: float = 0.0
    launched: float = 0.0
    next_report_s: float = 0.0

    @property
    def number(self) -> int:
        """From 1."""
        return self.failed.total() + 1


class TaskScheduler:
    """Runs the items of one ``fan_out``, inside ``cluster``.

    Args:
        on_failure: called with each permanent failure; raises to end the work.

    Raises:
        ResourceError: no node has room for a task.
    """

    def __init__(
        self,
        work: Callable[[Any], Any],
        config: RayConfig,
        what: str,
        on_failure: Callable[[StillroomError], None],
        observer: TaskObserver,
        *,
        reports_silence: bool,
    ) -> None:
        self._needed, self._what = task_resources(config), what
        self._where = f"ray.cpus_per_task={config.cpus_per_task}, ray.gpus_per_task={config.gpus_per_task:g}"
        if config.resources_per_task:
            self._where += f", ray.resources_per_task={config.resources_per_task}"
        require_resources(self._needed, what=what, where=self._where, wait_s=config.wait_s)
        # Ray's default fills half of a node before it takes the next one, so a few parts would share one node's
        # network while other nodes idle.
        self._options: dict[str, Any] = {
            "num_cpus": config.cpus_per_task,
            "num_gpus": config.gpus_per_task,
            "resources": config.resources_per_task,
            "scheduling_strategy": "SPREAD",
        }
        self._unnamed = _call.options(**self._options)
        self._work = ray.put(work)
        self._node_wait_s = node_wait_s(config)
        self._max_retries, self._timeout_s = config.max_retries, config.part_timeout_s
        self._on_failure, self._observer = on_failure, observer
        self._reports_silence = reports_silence
        self._limit, self._next_node_check = 0, 0.0
        self._without_nodes_since: float | None = None
        self._queued_s, self._longest_s = 0.0, 0.0
        self._num_named = 0
        self._waiting: list[_Attempt] = []
        self._in_flight: dict[ray.ObjectRef[Any], _Attempt] = {}

    def run(self, items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Each item with its result, in the order of completion.

        Raises:
            LostTaskError: no node could run a task for ``ray.wait_s`` seconds.
        """
        new_attempts = (_Attempt(item) for item in items)
        try:
            while self._launch(new_attempts):
                # A timeout, so that a retry whose pause is over does not wait for other tasks to finish.
                ready, _ = ray.wait(list(self._in_flight), num_returns=1, timeout=0.5) if self._in_flight else ([], [])
                if not self._in_flight:
                    time.sleep(0.05)
                for reference in ready:
                    yield from self._collect(reference)
                self._report_silence()
        finally:
            if retries := self._observer.retries:
                kinds = ", ".join(f"{count} after {kind}" for kind, count in sorted(retries.items()))
                emit(f"tasks were retried: {kinds}", event="retries", retries=dict(retries))

    def _launch(self, new_attempts: Iterator[_Attempt]) -> bool:
        """Launches tasks up to the limit, retries first. False where no task is in flight or waiting."""
        self._check_nodes()
        while len(self._in_flight) < self._limit and (attempt := self._next_retry() or next(new_attempts, None)):
            attempt.launched = time.monotonic()
            label = self._observer.label(attempt.item, attempt.number)
            reference = self._task(label).remote(self._work, attempt.item, label, self._timeout_s)
            self._in_flight[reference] = attempt
        return bool(self._in_flight or self._waiting)

    def _task(self, label: AttemptLabel) -> Any:
        """The task, named after its part on Ray's dashboard. Ray also keeps series of metrics for every name forever,
        so only the first ``MAX_NAMED_TASKS`` first attempts have a name, and every retry.
        """
        if label.attempt == 1:
            self._num_named += 1
            if self._num_named > MAX_NAMED_TASKS:
                return self._unnamed
        return _call.options(**self._options, name=f"{label.job}: {label.item}")

    def _check_nodes(self) -> None:
        """Sets how many tasks may be in flight from the nodes that are alive now.

        Raises:
            LostTaskError: no node could run a task for ``ray.wait_s`` seconds.
        """
        now = time.monotonic()
        if now < self._next_node_check:
            return
        self._next_node_check = now + _NODE_CHECK_S
        slots = num_slots(self._needed)
        # Without any node two tasks stay in flight, so that an autoscaler sees the demand.
        self._limit = 2 * max(1, slots)
        if slots:
            self._without_nodes_since = None
        elif self._without_nodes_since is None:
            self._without_nodes_since = now
            emit(
                f"no node is left for {self._what} ({resources_text(self._needed)}); "
                f"waiting up to {self._node_wait_s:g} s",
                event="waiting",
                level=logging.WARNING,
            )
        elif now - self._without_nodes_since > self._node_wait_s:
            raise LostTaskError(
                f"no node is left that could run {self._what}",
                code="ray.nodes-gone",
                where=self._where,
                got=f"none for {self._node_wait_s:g} s",
                expected=resources_text(self._needed),
                next_step="add nodes, then run the command again: finished parts stay",
            )

    def _report_silence(self) -> None:
        """Reports the task launched first where it takes far longer than all finished ones, at growing intervals. Tasks
        launched later may still be queued: Ray does not report which have begun.
        """
        if not self._in_flight or not self._reports_silence:
            return
        oldest = min(self._in_flight.values(), key=lambda attempt: attempt.launched)
        silent_s = time.monotonic() - oldest.launched
        if silent_s < max(oldest.next_report_s, SILENT_AFTER_S, _SILENT_FACTOR * self._longest_s):
            return
        oldest.next_report_s = 2 * silent_s
        limit = "" if self._timeout_s is None else f"; its process is ended after {self._timeout_s:g} s of work"
        text = f"attempt {oldest.number} has had no result for {silent_s:.0f} s{limit}"
        label = self._observer.label(oldest.item, oldest.number)
        label.emit("silent", text, logging.WARNING, silent_s=round(silent_s, 1))

    def _next_retry(self) -> _Attempt | None:
        now = time.monotonic()
        due = next((attempt for attempt in self._waiting if attempt.not_before <= now), None)
        if due is not None:
            self._waiting.remove(due)
        return due

    def _collect(self, reference: ray.ObjectRef[Any]) -> Iterator[tuple[Any, Any]]:
        attempt = self._in_flight.pop(reference)
        try:
            result, error, stats = ray.get(reference)
        except RayTaskError:
            # An exception that is not a StillroomError is a bug: the user needs its traceback.
            raise
        except RayError as failure:
            self._handle_loss(attempt, failure)
            return
        in_flight_s = time.monotonic() - attempt.launched
        self._queued_s, self._longest_s = in_flight_s - stats.seconds, max(self._longest_s, in_flight_s)
        if error is None:
            self._observer.done(attempt.item, result, stats, attempt=attempt.number)
            yield attempt.item, result
        elif isinstance(error, TransientStorageError):
            self._retry(attempt, error, stats, kind="a failure of storage")
        else:
            self._fail(attempt, error, stats)

    def _handle_loss(self, attempt: _Attempt, failure: RayError) -> None:
        in_flight_s = time.monotonic() - attempt.launched
        # An estimate: less the time that the last finished task was queued.
        stats = AttemptStats(node_of(failure), max(in_flight_s - self._queued_s, 0.0))
        name = self._observer.name(attempt.item)
        # Compared with the whole time in flight and not with the estimate, so that no timeout is taken for a crash.
        if isinstance(failure, WorkerCrashedError) and self._timeout_s is not None and in_flight_s >= self._timeout_s:
            self._retry(attempt, _timed_out(name, self._timeout_s, stats.node), stats, kind="a timeout")
        else:
            self._retry(attempt, _lost(failure, name), stats, kind=type(failure).__name__)

    def _fail(self, attempt: _Attempt, error: StillroomError, stats: AttemptStats) -> None:
        self._observer.failed(attempt.item, error, stats, attempt=attempt.number)
        self._on_failure(error)

    def _retry(self, attempt: _Attempt, error: StillroomError, stats: AttemptStats, *, kind: str) -> None:
        """Retries are counted by kind, so that lost nodes do not use up the retries of a storage failure."""
        factor = _NODE_LOSS_FACTOR if kind == NodeDiedError.__name__ else 1
        if attempt.failed[kind] == factor * self._max_retries:
            self._fail(attempt, error, stats)
            return
        pause_s = min(BACKOFF_S * 2 ** attempt.failed.total(), _MAX_BACKOFF_S)
        self._observer.retried(attempt.item, error, stats, attempt=attempt.number, kind=kind, pause_s=pause_s)
        attempt.failed[kind] += 1
        attempt.not_before = time.monotonic() + pause_s
        self._waiting.append(attempt)


def _timed_out(name: str, timeout_s: float, node: str | None) -> LostTaskError:
    return LostTaskError(
        "a part did not finish within its timeout",
        code="ray.part-timeout",
        where=name,
        got=f"no result after {timeout_s:g} s" + ("" if node is None else f" on {node}"),
        expected=f"ray.part_timeout_s={timeout_s:g} at most",
        next_step="see where it hung in the log of its worker (grep -A40 'Timeout (' "
        "/tmp/ray/session_latest/logs/worker-*.err on its node), or raise ray.part_timeout_s; then run the command "
        "again: finished parts stay",
    )


def _lost(failure: RayError, name: str) -> LostTaskError:
    lines = str(failure).strip().splitlines()
    reason, remedy = lines[0], "lower teacher.batch_size or max_pixels"
    if isinstance(failure, RuntimeEnvSetupError):
        # The last line of the node's traceback has the cause. Nodes repeat a cached failure for ten minutes.
        reason, remedy = lines[-1], "fix the job's working directory or requirements, or wait ten minutes"
    return LostTaskError(
        "a worker did not finish its task",
        code="ray.task-lost",
        where=name,
        got=f"{type(failure).__name__}: {reason}",
        next_step=f"run the command again: finished parts stay; if it happens again, {remedy}",
    )
