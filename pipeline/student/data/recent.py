"""What was made last, kept for who asks again."""

from __future__ import annotations

import resource
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

_MOST = 512
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The last ``size`` results of a function, by key. ``drop`` is called on a result that leaves.

    Another process that gets a copy of it, forked or pickled, keeps nothing or its own.
    """

    def __init__(self, make: Callable[[K], V], size: int, drop: Callable[[V], None] | None = None) -> None:
        self._make, self._size, self._drop = make, size, drop
        self._kept: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V:
        if key not in self._kept:
            self._kept[key] = self._make(key)
            self._shrink(self._size)
        self._kept.move_to_end(key)
        return self._kept[key]

    def pop(self, key: K) -> V | None:
        """What is kept under this key, which is then the caller's to drop."""
        return self._kept.pop(key, None)

    def clear(self) -> None:
        self._shrink(0)

    def _shrink(self, size: int) -> None:
        while len(self._kept) > size:
            _, value = self._kept.popitem(last=False)
            if self._drop is not None:
                self._drop(value)

    def __getstate__(self) -> tuple[object, ...]:
        # Open files cannot be sent.
        return self._make, self._size, self._drop

    def __setstate__(self, state: tuple[Callable[[K], V], int, Callable[[V], None] | None]) -> None:
        self._make, self._size, self._drop = state
        self._kept = OrderedDict()


def max_stored(files_each: int) -> int:
    """How many things of so many open files a process may keep: a third of the files that it may open, a limit that
    many systems set to 1,024."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(_MOST, max(allowed // 3 // files_each, 1)) if allowed != resource.RLIM_INFINITY else _MOST
