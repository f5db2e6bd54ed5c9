"""Standard streams that may be closed, full or broken: no work fails because its output cannot be written."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any

_DESCRIPTORS = (0, 1, 2)


class _Unfailing(io.RawIOBase):
    """A file that records the error of a write and goes on as if it had been written."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file.fileno()

    def isatty(self) -> bool:
        return self._file.isatty()

    def write(self, data: Any, /) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            return len(data)


def protect_streams() -> None:
    """Reopens standard streams that are closed, and makes writing to the others never raise. Calling it again changes
    nothing.

    A closed descriptor would be given to the next file that is opened, and what libraries print would go into it.
    """
    for descriptor in _DESCRIPTORS:
        _reopen(descriptor)
    sys.stdout = _protected(sys.stdout, 1)
    sys.stderr = _protected(sys.stderr, 2)


def _reopen(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)
        os.set_inheritable(descriptor, True)


def _protected(stream: Any, descriptor: int) -> Any:
    if stream is None:
        return _text(io.FileIO(descriptor, "w", closefd=False), "utf-8", line_buffering=True)
    buffer = getattr(stream, "buffer", None)
    # With PYTHONUNBUFFERED there is nothing between text and file.
    raw = buffer if isinstance(buffer, io.FileIO) else getattr(buffer, "raw", None)
    # What a test or a notebook has put there is left as it is.
    if not isinstance(raw, io.FileIO):
        return stream
    with suppress(OSError):
        stream.flush()
    return _text(raw, stream.encoding, line_buffering=stream.line_buffering or stream.write_through)


def _text(raw: io.FileIO, encoding: str, *, line_buffering: bool) -> io.TextIOWrapper:
    # Not every terminal's encoding has every character of a path.
    binary = io.BufferedWriter(_Unfailing(raw))
    return io.TextIOWrapper(binary, encoding=encoding, errors="backslashreplace", line_buffering=line_buffering)


def lost_output() -> OSError | None:
    """Why something printed to standard output did not arrive; None: all did, or its reader has ended (``| head``)."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return error
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    error = raw.error if isinstance(raw, _Unfailing) else None
    return None if error is None or error.errno == errno.EPIPE else error
