"""Standard streams that may be closed, full or broken. A job does not fail because its output cannot be written."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any

_DESCRIPTORS = (0, 1, 2)


class _ErrorRecordingFile(io.RawIOBase):
    """A file that records the first error of a write and reports success."""

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
    """Reopens standard streams that are closed, and makes writes to the others never raise. Idempotent.

    The next file that is opened would get a closed descriptor, and libraries would print into it.
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
    # A stream of a test or a notebook is left as it is.
    if not isinstance(raw, io.FileIO):
        return stream
    with suppress(OSError):
        stream.flush()
    return _text(raw, stream.encoding, line_buffering=stream.line_buffering or stream.write_through)


def _text(raw: io.FileIO, encoding: str, *, line_buffering: bool) -> io.TextIOWrapper:
    # A terminal's encoding may lack characters of a path.
    binary = io.BufferedWriter(_ErrorRecordingFile(raw))
    return io.TextIOWrapper(binary, encoding=encoding, errors="backslashreplace", line_buffering=line_buffering)


def lost_output() -> OSError | None:
    """Why text printed to standard output was lost; None: none was, or its reader has ended (``| head``)."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return error
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    error = raw.error if isinstance(raw, _ErrorRecordingFile) else None
    return None if error is None or error.errno == errno.EPIPE else error
