"""Results of a function, the least recently used of which are released."""

from __future__ import annotations

import resource
from collections.abc import Callable, Hashable
from typing import TypeVar

from cachetools import LRUCache

_MAX_OPEN = 512
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Memo(LRUCache[K, V]):
    """``memo[key]`` is the result of a function; the last ``size`` are stored, and ``release`` is called on the others.

    A pickled copy starts empty: open files cannot be sent.
    """

    def __init__(self, function: Callable[[K], V], size: int, release: Callable[[V], None] | None = None) -> None:
        super().__init__(size)
        self._function, self._release = function, release

    def __missing__(self, key: K) -> V:
        value = self[key] = self._function(key)
        return value

    def popitem(self) -> tuple[K, V]:
        key, value = super().popitem()
        if self._release is not None:
            self._release(value)
        return key, value

    def clear(self) -> None:
        while self:
            self.popitem()

    def __reduce__(self) -> tuple[object, ...]:
        return Memo, (self._function, self.maxsize, self._release)


def max_open(files_each: int) -> int:
    """How many results of so many open files a process may hold: a third of the files that it may open, a limit that
    many systems set to 1,024."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(_MAX_OPEN, max(allowed // 3 // files_each, 1)) if allowed != resource.RLIM_INFINITY else _MAX_OPEN
