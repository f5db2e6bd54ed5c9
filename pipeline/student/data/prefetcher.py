"""Fetches the files of coming steps to this node while earlier steps are trained on.

The order determines which step needs which (shard, view) first, so no heuristic is needed. One process of each rank
fetches for all its loader processes; one that needs a file earlier waits for it or creates it.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from pipeline.core.errors import StillroomError
from pipeline.student.data.order import TrainingOrder
from pipeline.student.data.sources import RowSource

_THREADS = 8
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _ShardNeed:
    """A shard and views of it that an epoch needs first at this step, counted over all epochs."""

    step: int
    shard: int
    views: range


class Prefetcher:
    """Fetches up to one window of shards ahead, and no more than half of what the node's store may hold.

    Start it after the loader processes: a process forked from one with threads inherits locks that are never released.
    """

    def __init__(self, source: RowSource, order: TrainingOrder, *, rank: int, world_size: int, steps: range) -> None:
        self._source, self._order = source, order
        self._rank, self._world_size = rank, world_size
        self._max_ahead = _max_ahead(source, order.views_per_image, world_size)
        self._needs = self._look_ahead(steps)
        self._next: _ShardNeed | None = None
        self._ahead: deque[int] = deque()
        """First steps of the shards that were requested and are not used yet."""
        self._step = steps.start - 1
        self._failed: list[BaseException] = []
        self._walking: Future[None] | None = None
        self._walker = ThreadPoolExecutor(1, thread_name_prefix="look-ahead")
        self._fetchers = ThreadPoolExecutor(_THREADS, thread_name_prefix="fetch")

    def __enter__(self) -> Self:
        self.advance(self._step)
        return self

    def __exit__(self, *_: object) -> None:
        self._walker.shutdown(cancel_futures=True)
        self._fetchers.shutdown(cancel_futures=True)

    def advance(self, step: int) -> None:
        """Reports that this step was handed out. Returns at once."""
        self._step = step
        if self._failed:
            raise self._failed[0]
        if self._max_ahead and (self._walking is None or self._walking.done()):
            self._walking = self._walker.submit(self._guarded, self._walk)

    def _walk(self) -> None:
        """Requests shards up to a window after the current step, as far as there is room."""
        while self._ahead and self._ahead[0] <= self._step:
            self._ahead.popleft()
        while len(self._ahead) < self._max_ahead:
            self._next = self._next or next(self._needs, None)
            if self._next is None or self._next.step > self._step + self._order.window_steps:
                return
            self._fetchers.submit(self._guarded, self._fetch, self._next)
            self._ahead.append(self._next.step)
            self._next = None

    def _look_ahead(self, steps: range) -> Iterator[_ShardNeed]:
        num_steps = self._order.num_steps
        for epoch in range(steps.start // num_steps, -(-steps.stop // num_steps)):
            first, views = epoch * num_steps, self._order.views(epoch)
            rows = self._order.epoch(epoch, self._source.view_of(views[0]))
            expected = range(max(steps.start - first, 0), min(steps.stop - first, num_steps))
            for step, shard in rows.first_steps(expected, self._rank, self._world_size):
                yield _ShardNeed(first + step, shard, views)

    def _fetch(self, need: _ShardNeed) -> None:
        try:
            self._source.fetch(need.shard, need.views)
        except StillroomError as error:
            # The reader raises the same error at its step, after all batches before it.
            _log.info("shard %s was not fetched ahead: %s", self._source.shard_ids[need.shard], error.what)

    def _guarded(self, work: Callable[..., None], *args: object) -> None:
        try:
            work(*args)
        except Exception as error:
            self._failed.append(error)


def ranks_on_node(world_size: int) -> int:
    """How many ranks share this node and its store: torchrun and Ray Train set it; by default all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def _max_ahead(source: RowSource, views_per_image: int, world_size: int) -> int:
    """In shards; half of the store is left to the files in use."""
    shard_bytes = source.fetched_bytes(views_per_image)
    if shard_bytes == 0:
        return 0
    return max(1, source.store.limit() // 2 // ranks_on_node(world_size) // shard_bytes)


def budget_warnings(source: RowSource, order: TrainingOrder, *, rank: int, world_size: int) -> list[str]:
    """Warns if the files that are in use at a time do not fit into the node's store."""
    shards = min(order.shards_at_once(rank, world_size) * ranks_on_node(world_size), len(source.shard_ids))
    needed, limit = shards * source.fetched_bytes(order.views_per_image), source.store.limit()
    if needed <= limit:
        return []
    return [
        f"about {needed:,} bytes of shards and views are in use at a time on this node, and {limit:,} may be stored in "
        f"{source.store.folder} (data.local_bytes, data.local_dir): files will be fetched again and again; raise it, "
        "set train.order: pinned or fewer train.lanes, or train on more nodes"
    ]
