"""Results of a function, the least recently used of which are released."""

from __future__ import annotations

import resource
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from cachetools import LRUCache

_MAX_OPEN = 512
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _ReleasingCache(LRUCache[K, V]):
    def __init__(self, size: int, release: Callable[[V], None] | None) -> None:
        super().__init__(size)
        self._release = release

    def popitem(self) -> tuple[K, V]:
        key, value = super().popitem()
        if self._release is not None:
            self._release(value)
        return key, value


class Memo(Generic[K, V]):
    """The last ``size`` results of a function, by key. ``release`` is called on a result that leaves.

    A pickled copy starts empty.
    """

    def __init__(self, function: Callable[[K], V], size: int, release: Callable[[V], None] | None = None) -> None:
        self._function, self._size, self._release = function, size, release
        self._results: _ReleasingCache[K, V] = _ReleasingCache(size, release)

    def get(self, key: K) -> V:
        if key not in self._results:
            self._results[key] = self._function(key)
        return self._results[key]

    def pop(self, key: K) -> V | None:
        """The result for this key, if there is one; the caller releases it."""
        return self._results.pop(key, None)

    def clear(self) -> None:
        """Releases all results."""
        while self._results:
            self._results.popitem()

    def __getstate__(self) -> tuple[object, ...]:
        # Open files cannot be sent.
        return self._function, self._size, self._release

    def __setstate__(self, state: tuple[Callable[[K], V], int, Callable[[V], None] | None]) -> None:
        self._function, self._size, self._release = state
        self._results = _ReleasingCache(self._size, self._release)


def max_open(files_each: int) -> int:
    """How many results of so many open files a process may hold: a third of the files that it may open, a limit that
    many systems set to 1,024."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(_MAX_OPEN, max(allowed // 3 // files_each, 1)) if allowed != resource.RLIM_INFINITY else _MAX_OPEN
