"""Create-if-absent: files that two writers cannot both publish."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.core.errors import StorageError, StorageInputError, TransientStorageError
from pipeline.core.redaction import redact
from pipeline.storage.failures import repeated, s3_error_code, translated_errors
from pipeline.storage.filesystems import check_not_read_only, filesystem_of
from pipeline.storage.local import fsync, fsync_folder, make_folder, temporary_sibling
from pipeline.storage.objects import S3_CHECKSUM, delete, read_whole
from pipeline.storage.urls import join, protocol

# What a file system answers to an operation that it does not have.
_NOT_SUPPORTED = frozenset({errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
# From <linux/fcntl.h> and <linux/fs.h>.
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
_memory_lock = threading.Lock()


@repeated
def create(url: str, data: bytes) -> bool:
    """Publishes bytes only where nothing is. True if they stand now; False if others were first.

    Who finds its own bytes has won too: its first answer was lost, or an equal builder was as fast. Nobody could tell
    the two apart, and nobody has to, since equal bytes mean the same to every reader.

    Raises:
        StorageInputError: the store offers no conditional create that is implemented here.
    """
    check_not_read_only(url)
    creates = _CREATES.get(protocol(url))
    if creates is None:
        raise StorageInputError(
            "this store has no create-if-absent here yet",
            where=redact(url),
            got=protocol(url),
            expected="file, memory or s3 for caches and runs",
            next_step="write to one of these; reading from it works",
        )
    filesystem, path = filesystem_of(url)
    with translated_errors(url, "create"):
        if creates(filesystem, path, data):
            return True
        try:
            return read_whole(filesystem, path, url, None) == data
        except FileNotFoundError as error:
            raise TransientStorageError("what stood here was removed at this moment", where=redact(url)) from error


def _create_file(_: Any, path: str, data: bytes) -> bool:
    target = Path(path)
    if target.is_file():
        return False
    make_folder(target.parent)
    scratch = temporary_sibling(target)
    try:
        scratch.write_bytes(data)
        fsync(scratch)
        _publish_new(scratch, target)
        fsync_folder(target.parent)
    except FileExistsError:
        return False
    finally:
        scratch.unlink(missing_ok=True)
    return True


def _publish_new(scratch: Path, target: Path) -> None:
    """Gives a complete file its final name, unless that name is taken.

    Raises:
        FileExistsError: it is taken.
        StorageInputError: the file system has no operation that does this atomically.
    """
    try:
        # A hard link either appears with all its bytes or not at all, also over NFS.
        os.link(scratch, target)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        _rename_new(scratch, target, no_links=error)


def _rename_new(scratch: Path, target: Path, *, no_links: OSError) -> None:
    """The same where there are no hard links: vfat and exFAT, some SMB shares and FUSE file systems."""
    # Python has no function for it, so its audit event is ours to raise.
    sys.audit("os.rename", scratch, target, -1, -1)
    number = _renameat2_noreplace(scratch, target)
    if number in _NOT_SUPPORTED:
        raise StorageInputError(
            "this file system cannot create a file only where none exists, which keeps two writers apart",
            code="storage.no-exclusive-create",
            where=str(target.parent),
            got=f"no hard links ({no_links.strerror}), no renameat2 with RENAME_NOREPLACE ({os.strerror(number)})",
            expected="one of the two: local Linux file systems, NFS and most SMB shares have it",
            next_step="choose a folder on another file system, or s3://",
        ) from no_links
    if number:
        raise OSError(number, os.strerror(number), str(scratch), None, str(target))


def _renameat2_noreplace(source: Path, target: Path) -> int:
    """The error number of the system call; 0: it succeeded."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return errno.ENOSYS
    failed = renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE)
    return ctypes.get_errno() if failed else 0


def _create_memory(filesystem: Any, path: str, data: bytes) -> bool:
    with _memory_lock:
        if filesystem.exists(path):
            return False
        filesystem.pipe_file(path, data)
        return True


def _create_s3(filesystem: Any, path: str, data: bytes) -> bool:
    try:
        # s3fs turns this mode into PutObject with If-None-Match: *, which the store decides atomically.
        filesystem.pipe_file(path, data, mode="create", **S3_CHECKSUM)
    except FileExistsError:
        return False
    except OSError as error:
        # Not every store names the condition that failed, as s3fs wants it.
        if s3_error_code(error) == "PreconditionFailed":
            return False
        raise
    return True


_CREATES: dict[str, Callable[[Any, str, bytes], bool]] = {
    "file": _create_file,
    "memory": _create_memory,
    "s3": _create_s3,
}


def probe(url: str) -> None:
    """Proves before any work that files can be created, kept from a second creator, and removed below ``url``.

    Raises:
        StorageInputError: one of these fails. Nothing is left behind.
    """
    name = f".tmp-probe-{uuid.uuid4().hex}"
    target = join(_existing_folder(url) if protocol(url) == "file" else url, name)
    if not create(target, b"first"):
        raise StorageError("another object stands under a new random name", where=redact(target))
    try:
        is_safe = not create(target, b"second")
    finally:
        delete(target)
    if not is_safe:
        raise StorageInputError(
            "this store does not heed create-if-absent: two builders would overwrite each other's work",
            where=redact(url),
            got="a second create of the same object that succeeded",
            next_step="use a store or a version of it with conditional writes (If-None-Match)",
        )


def _existing_folder(url: str) -> str:
    """The deepest folder on the way to a local path that is there: a probe leaves no new one."""
    path = Path(filesystem_of(url)[1])
    return str(next(folder for folder in (path, *path.parents) if folder.exists()))
