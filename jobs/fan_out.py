"""Run many independent pieces of work: as Ray tasks with bounded flight and counted retries, or as a plain loop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from jobs.ray_runtime import cluster, require_resources, slots
from pipeline.errors import StillroomError, StorageError
from schemas.config import RayConfig

T = TypeVar("T")
R = TypeVar("R")
_BACKOFF_S = 1.0


# max_calls=0 keeps the worker process, and with it the loaded model, from task to task also on GPUs, where Ray would
# start a new process for each. max_retries=0: Ray's own retries are unbounded for some failures, so they are ours.
@ray.remote(max_retries=0, max_calls=0)
def _call(work: Callable[[Any], Any], item: Any) -> tuple[Any, StillroomError | None]:
    # Returned, not raised: Ray would wrap it in an exception of its own making.
    try:
        return work(item), None
    except StillroomError as error:
        return None, error


def fan_out(work: Callable[[T], R], items: Sequence[T], config: RayConfig, *, what: str) -> Iterator[tuple[T, R]]:
    """Each item with its result, in the order of completion.

    About two tasks a slot are in flight: enough to keep every worker busy and to show an autoscaler what is waiting,
    few enough that the driver's memory does not grow with the number of items.

    Raises:
        StillroomError: an item failed for good. What is in flight is cancelled.
    """
    if config.address == "none":
        for item in items:
            yield item, work(item)
        return
    with cluster(config):
        yield from _Flight(work, config, what).run(items)


class _Flight:
    def __init__(self, work: Callable[[Any], Any], config: RayConfig, what: str) -> None:
        needed = {"CPU": float(config.cpus_per_task), "GPU": config.gpus_per_task}
        where = f"ray.cpus_per_task={config.cpus_per_task}, ray.gpus_per_task={config.gpus_per_task:g}"
        require_resources(needed, what=what, where=where)
        self._remote = _call.options(num_cpus=config.cpus_per_task, num_gpus=config.gpus_per_task)
        self._work = ray.put(work)
        self._limit = 2 * slots(needed)
        self._max_retries = config.max_retries
        self._waiting: deque[tuple[Any, int, float]] = deque()
        self._flying: dict[ray.ObjectRef, tuple[Any, int]] = {}

    def run(self, items: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        self._waiting.extend((item, 0, 0.0) for item in items)
        try:
            while self._waiting or self._flying:
                self._launch()
                ready, _ = ray.wait(list(self._flying), num_returns=1, timeout=0.5) if self._flying else ([], [])
                if not self._flying:
                    time.sleep(0.05)
                for reference in ready:
                    yield from self._collect(reference)
        finally:
            for reference in self._flying:
                ray.cancel(reference, force=True)

    def _launch(self) -> None:
        for _ in range(len(self._waiting)):
            if len(self._flying) >= self._limit:
                return
            item, attempt, not_before = self._waiting.popleft()
            if time.monotonic() < not_before:
                self._waiting.append((item, attempt, not_before))
                continue
            self._flying[self._remote.remote(self._work, item)] = (item, attempt)

    def _collect(self, reference: ray.ObjectRef) -> Iterator[tuple[Any, Any]]:
        item, attempt = self._flying.pop(reference)
        try:
            result, error = ray.get(reference)
        except RayError as lost:
            result, error = None, _lost(lost)
        if error is None:
            yield item, result
        elif isinstance(error, StorageError) and attempt < self._max_retries:
            self._waiting.append((item, attempt + 1, time.monotonic() + _BACKOFF_S * 2**attempt))
        else:
            raise error


def _lost(error: RayError) -> StorageError:
    """A worker or node that died: as passing as a storage that failed, and retried as often."""
    return StorageError(
        "a worker did not finish its task",
        got=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
        next_step="run the command again: finished parts stay; if it repeats, lower teacher.batch_size or max_pixels",
    )
