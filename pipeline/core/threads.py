"""Threads whose results arrive in order: a map with a bounded window, and an iterator that runs ahead of its reader."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_ordered(
    function: Callable[[T], R],
    items: Iterable[T],
    *,
    threads: int,
    ahead: int | None = None,
    name: str = "map",
) -> Generator[R]:
    """``function(item)`` of each item, in the order of the items. An error arrives at the position of its item.

    ``items`` is read in the calling thread, and ``function`` runs in ``threads`` threads.

    Args:
        ahead: items that are taken before their results are requested, so that memory stays bounded. Default: twice
            ``threads``.
        name: prefix of the thread names.
    """
    window = 2 * threads if ahead is None else ahead
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    pending: deque[Future[R]] = deque()
    waits = True
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > window:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except GeneratorExit:
        # The garbage collector may close this generator in a thread of the pool, which cannot wait for itself.
        waits = False
        raise
    finally:
        pool.shutdown(wait=waits, cancel_futures=True)


class _End:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetch(items: Iterator[T], *, depth: int = 1) -> Generator[T]:
    """The same items in the same order, up to ``depth`` of them computed in a thread before they are requested.

    An error arrives at the position at which it was raised. Closing the returned generator stops the thread before its
    next item, and closes ``items`` if it is a generator.
    """
    ready: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
    room, stop = threading.Semaphore(depth), threading.Event()

    def work() -> None:
        error: BaseException | None = None
        try:
            # A generator, which may have an open file, can only be closed in the thread that runs it.
            with closing(items) if isinstance(items, Generator) else nullcontext():
                while room.acquire() and not stop.is_set():
                    ready.put(next(items))
        except StopIteration:
            pass
        except BaseException as caught:
            error = caught
        ready.put(_End(error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            room.release()
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stop.set()
        room.release()
        thread.join()
