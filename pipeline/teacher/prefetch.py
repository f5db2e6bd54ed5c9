"""Run an iterator one step ahead in a thread, so that the stages of a build overlap."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import closing, nullcontext
from typing import TypeVar

T = TypeVar("T")


class _End:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetch(items: Iterator[T], *, depth: int = 1) -> Generator[T]:
    """The same items in the same order, at most ``depth`` of them made before they are asked for. Errors arrive where
    they happened in the order.

    Closing the returned generator stops the thread before its next item, and closes ``items`` if it is a generator.
    """
    made: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
    room, stop = threading.Semaphore(depth), threading.Event()

    def work() -> None:
        error: BaseException | None = None
        try:
            # Closed here, since a generator may only be closed where it does not run; it may hold an open file.
            with closing(items) if isinstance(items, Generator) else nullcontext():
                while room.acquire() and not stop.is_set():
                    made.put(next(items))
        except StopIteration:
            pass
        except BaseException as caught:
            error = caught
        made.put(_End(error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while not isinstance(item := made.get(), _End):
            room.release()
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stop.set()
        room.release()
        thread.join()
