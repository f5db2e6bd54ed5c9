"""Files of this machine: durable writes, exclusive creates, and walks that follow links."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import uuid
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.errors import StorageInputError
from pipeline.storage.stores import Store

# What a file system returns for an operation that it does not support.
_NOT_SUPPORTED = frozenset({errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
# From <linux/fcntl.h> and <linux/fs.h>.
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1


class LocalStore(Store):
    can_create = True

    def put(self, local: Path) -> None:
        target = Path(self.path)
        make_folder(target.parent)
        with temporary_sibling(target) as scratch:
            shutil.copyfile(local, scratch)
            fsync(scratch)
            scratch.replace(target)
            _fsync_folder(target.parent)

    def create(self, data: bytes) -> bool:
        target = Path(self.path)
        if target.is_file():
            return False
        make_folder(target.parent)
        try:
            with temporary_sibling(target) as scratch:
                scratch.write_bytes(data)
                fsync(scratch)
                _publish_new(scratch, target)
                _fsync_folder(target.parent)
        except FileExistsError:
            return False
        return True

    def folders(self) -> list[str]:
        return [item.name for item in Path(self.path).iterdir() if item.is_dir()]

    def sizes(self, *, links_out: bool) -> dict[str, int]:
        """Bytes of every file below the folder by its relative path, also behind links."""
        folder = Path(self.path)
        files = _walk(folder, None if links_out else folder.resolve(), ())
        return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def make_folder(folder: Path) -> None:
    """Creates a folder and its missing parents. Each entry is on disk before anything is put into it."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _fsync_folder(folder.parent)


@contextmanager
def temporary_sibling(target: Path) -> Generator[Path]:
    """A new name in the target's folder. Its file is removed at the end of the ``with``, unless it was renamed."""
    scratch = target.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        yield scratch
    finally:
        scratch.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fsync_folder(folder: Path) -> None:
    """Syncs new names to disk, if the file system can: some network file systems cannot."""
    try:
        fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _publish_new(scratch: Path, target: Path) -> None:
    """Gives a complete file its final name, unless that name is taken.

    Raises:
        FileExistsError: it is taken.
        StorageInputError: the file system has no operation that does this atomically.
    """
    try:
        # A hard link appears with all its bytes or not at all, also over NFS.
        os.link(scratch, target)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        _rename_new(scratch, target, link_error=error)


def _rename_new(scratch: Path, target: Path, *, link_error: OSError) -> None:
    """The same without hard links: on vfat and exFAT, some SMB shares and FUSE file systems."""
    # Python has no function for the system call, so nothing else raises its audit event.
    sys.audit("os.rename", scratch, target, -1, -1)
    number = renameat2_noreplace(scratch, target)
    if number in _NOT_SUPPORTED:
        raise StorageInputError(
            "this file system has no atomic create-if-absent, which protects a file from a second writer",
            code="storage.no-exclusive-create",
            where=str(target.parent),
            got=f"no hard links ({link_error.strerror}), no renameat2 with RENAME_NOREPLACE ({os.strerror(number)})",
            expected="one of the two: local Linux file systems, NFS and most SMB shares have it",
            next_step="choose a folder on another file system, or s3://",
        ) from link_error
    if number:
        raise OSError(number, os.strerror(number), str(scratch), None, str(target))


def renameat2_noreplace(source: Path, target: Path) -> int:
    """Renames unless the target exists. Returns the error number of the system call; 0: it succeeded."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return errno.ENOSYS
    failed = renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE)
    return ctypes.get_errno() if failed else 0


def _walk(folder: Path, root: Path | None, ancestors: tuple[Path, ...]) -> Iterator[Path]:
    """Every file below a folder. Links are followed.

    Args:
        root: no link may lead out of it; None: any link is followed.
        ancestors: the folders that contain this one, resolved.

    Raises:
        StorageInputError: a link leads out of ``root``, or to an ancestor.
    """
    if not folder.is_dir():
        return
    ancestors = (*ancestors, folder.resolve())
    with os.scandir(folder) as entries:
        for entry in entries:
            path = Path(entry)
            target = path.resolve() if entry.is_symlink() else None
            if target is not None and target in ancestors:
                raise StorageInputError(
                    "a link leads to a folder that contains it",
                    code="storage.link-cycle",
                    where=str(path),
                    got=str(target),
                )
            if target is not None and root is not None and not target.is_relative_to(root):
                raise StorageInputError(
                    "a link leads out of this folder",
                    code="storage.link-out",
                    where=str(path),
                    got=str(target),
                    next_step="copy its target, or pass --links-out if you trust all of its files",
                )
            if entry.is_dir():
                yield from _walk(path, root, ancestors)
            else:
                yield path
