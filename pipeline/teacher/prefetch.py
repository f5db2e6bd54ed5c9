"""Run an iterator one step ahead in a thread, so that decoding overlaps inference."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")


class _End:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetch(items: Iterator[T], *, depth: int = 1) -> Generator[T]:
    """The same items in the same order, ``depth`` of them made ahead. Errors arrive where they happened in the order.

    Closing the returned generator stops the thread before its next item, and closes ``items`` if it is a generator.
    """
    ready: queue.Queue[T | _End] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def offer(item: T | _End) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        error: BaseException | None = None
        try:
            for item in items:
                if not offer(item):
                    return
        except BaseException as caught:
            error = caught
        finally:
            # Here, since a generator may only be closed where it does not run; it may hold an open file.
            if isinstance(items, Generator):
                items.close()
        offer(_End(error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stop.set()
        thread.join()
