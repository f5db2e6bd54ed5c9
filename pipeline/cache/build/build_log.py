"""Progress records of running builds. No digest covers these records, so they may have times and host names.

A driver writes one record and renews it; a finished build removes all records.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from typing import Self

from pipeline import storage
from pipeline.cache.format import layout
from pipeline.cache.format.files import parse_record
from pipeline.core.errors import StillroomError
from pipeline.core.hashing import seal
from pipeline.core.redaction import redact
from schemas.cache_format import BuildLog

RENEW_S = 30.0
STALE_S = 600.0
"""A driver that has not renewed its record for longer has most likely ended."""
_logger = logging.getLogger(__name__)


class BuildLogWriter:
    """Context manager that writes the record of one driver. Times are seconds since 1970.

    A thread renews the record until the first part is done, because no commit shows yet that the build is running.
    """

    def __init__(
        self, cache_url: str, *, num_parts: int, num_before: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        self._num_done = num_before
        self._lock, self._has_progress = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._renew_until_progress, name="build log", daemon=True)
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

    def __enter__(self) -> Self:
        self.update(self._num_done)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._has_progress.set()
        self._thread.join()
        if kind is not None and not self._num_done:
            # The build has ended without a part, so there is nothing to protect from ``gc --unused-header``.
            with contextlib.suppress(StillroomError):
                storage.delete(self._url)

    def update(self, num_done: int) -> None:
        """Sets how many of all parts are done. Writes the record the first time, then at most every half minute."""
        self._num_done = num_done
        if num_done > self._log.num_before:
            self._has_progress.set()
            if self._clock() - self._log.renewed_s < RENEW_S:
                return
        self._write()

    def _renew_until_progress(self) -> None:
        while not self._has_progress.wait(RENEW_S):
            try:
                self._write()
            except StillroomError as error:
                _logger.warning("the record of this build could not be renewed: %s", error)

    def _write(self) -> None:
        with self._lock:
            self._log = self._log.model_copy(update={"num_done": self._num_done, "renewed_s": self._clock()})
            storage.write(self._url, seal(self._log.model_dump(mode="json")))


def read_last_log(cache_url: str) -> BuildLog | None:
    """The most recently renewed record.

    Raises:
        CacheError: a record was changed after it was written.
    """
    logs: list[BuildLog] = []
    for path in _paths(cache_url):
        url = storage.join(cache_url, path)
        data = storage.read(url, max_bytes=storage.MAX_RECORD_BYTES)
        logs.append(parse_record(BuildLog, data, where=redact(url)))
    return max(logs, key=lambda log: log.renewed_s, default=None)


def find_running_build(cache_url: str, *, now_s: float) -> BuildLog | None:
    """The most recently renewed record, if that was within ``STALE_S``.

    Raises:
        CacheError: a record was changed after it was written.
    """
    log = read_last_log(cache_url)
    return log if log is not None and now_s - log.renewed_s <= STALE_S else None


def remove_logs(cache_url: str) -> None:
    """Removes all records, after a build has finished."""
    for path in _paths(cache_url):
        storage.delete(storage.join(cache_url, path))


def _paths(cache_url: str) -> list[str]:
    return [f"{layout.LOG}/{name}" for name in storage.listing(storage.join(cache_url, layout.LOG))]
