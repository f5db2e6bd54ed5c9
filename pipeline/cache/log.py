"""How far builds have come, for people: outside of every digest, so that it may hold times and names of hosts.

A driver writes one record and renews it; a finished build removes all of them.
"""

from __future__ import annotations

import os
import platform
import time
import uuid
from collections.abc import Callable

from pipeline import storage
from pipeline.cache import layout
from pipeline.cache.files import parse_record
from pipeline.fingerprint import seal
from schemas.manifest import BuildLog

_RENEW_S = 30.0


class BuildLogWriter:
    """The record of one driver. Times are seconds since 1970."""

    def __init__(
        self, cache_url: str, *, num_parts: int, num_before: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        self._url = storage.join(cache_url, layout.LOG, f"build-{uuid.uuid4().hex[:12]}.json")
        began_s = clock()
        self._log = BuildLog(
            host=platform.node(),
            process=os.getpid(),
            began_s=began_s,
            renewed_s=began_s,
            num_parts=num_parts,
            num_before=num_before,
            num_done=num_before,
        )

    def update(self, num_done: int) -> None:
        """Says how many of all parts are done; written at first, and then every half minute at most."""
        now_s = self._clock()
        if num_done > self._log.num_before and now_s - self._log.renewed_s < _RENEW_S:
            return
        self._log = self._log.model_copy(update={"num_done": num_done, "renewed_s": now_s})
        storage.write(self._url, seal(self._log.model_dump(mode="json")))


def read_last_log(cache_url: str) -> BuildLog | None:
    """The record that was renewed last.

    Raises:
        CacheError: a record was changed after it was written.
    """
    logs: list[BuildLog] = []
    for path in _paths(cache_url):
        url = storage.join(cache_url, path)
        data = storage.read(url, max_bytes=storage.MAX_RECORD_BYTES)
        logs.append(parse_record(BuildLog, data, where=storage.redact(url)))
    return max(logs, key=lambda log: log.renewed_s, default=None)


def remove_logs(cache_url: str) -> None:
    """Of a finished build nobody asks how far it has come."""
    for path in _paths(cache_url):
        storage.delete(storage.join(cache_url, path))


def _paths(cache_url: str) -> list[str]:
    return [f"{layout.LOG}/{name}" for name in storage.listing(storage.join(cache_url, layout.LOG))]
