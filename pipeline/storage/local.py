"""Files and folders of this machine: durable writes, walks, scratch folders."""

from __future__ import annotations

import base64
import contextlib
import errno
import os
import shutil
import uuid
import zlib
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

from pipeline.core.errors import StorageInputError
from pipeline.core.redaction import redact
from pipeline.core.temporary import temporary_folder
from pipeline.storage.failures import DISK_FULL, disk_full, translated_errors
from pipeline.storage.filesystems import filesystem_of
from pipeline.storage.urls import NAME_TOO_LONG, protocol

_READ_BLOCK_BYTES = 2**20


def check_names(folder_url: str, names: Iterable[str]) -> None:
    """Refuses, before any work, names of files that a folder of this machine could not hold; writes nothing.

    Raises:
        StorageInputError: a name is longer than its file system takes.
    """
    folder = local_folder(folder_url)
    longest = max((os.fsencode(name) for name in names), key=len, default=b"")
    if folder is None or len(longest) <= (limit := os.pathconf(folder, "PC_NAME_MAX")):
        return
    raise StorageInputError(
        "a file name would be too long for this file system",
        code=NAME_TOO_LONG,
        where=redact(folder_url),
        got=f"{len(longest)} bytes: {os.fsdecode(longest)}",
        expected=f"at most {limit} bytes, with what is added to the name of a shard",
        next_step="rename the shard",
    )


def walk(folder: Path, root: Path | None, above: tuple[Path, ...]) -> Iterator[Path]:
    """``above``: the folders that this one is in, links followed; no link may lead out of ``root``."""
    if not folder.is_dir():
        return
    above = (*above, folder.resolve())
    with os.scandir(folder) as found:
        for entry in found:
            path = Path(entry)
            target = path.resolve() if entry.is_symlink() else None
            if target is not None and (target in above or not (root is None or target.is_relative_to(root))):
                raise StorageInputError(
                    "a link leads to a folder that it is in" if target in above else "a link leads out of this folder",
                    where=str(path),
                    got=str(target),
                    next_step=None if target in above else "copy what it leads to, or pass --links-out if all is yours",
                )
            if entry.is_dir():
                yield from walk(path, root, above)
            else:
                yield path


def local_path(url: str) -> Path | None:
    """The path of a file of this machine; None for other stores."""
    return Path(filesystem_of(url)[1]) if protocol(url) == "file" else None


def local_folder(url: str) -> Path | None:
    """The nearest folder of this machine in which the objects of ``url`` lie or would lie; None for other stores."""
    if protocol(url) != "file":
        return None
    path = Path(filesystem_of(url)[1])
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def put_file(local: Path, target: Path) -> None:
    make_folder(target.parent)
    scratch = temporary_sibling(target)
    try:
        shutil.copyfile(local, scratch)
        fsync(scratch)
        scratch.replace(target)
        fsync_folder(target.parent)
    finally:
        scratch.unlink(missing_ok=True)


def crc32(path: Path) -> str:
    """As S3 writes it: base64 of the big-endian word."""
    value = 0
    with path.open("rb") as handle:
        while block := handle.read(_READ_BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return base64.b64encode(value.to_bytes(4, "big")).decode()


def make_folder(folder: Path) -> None:
    """A folder and what it lacks above it, each entry on disk before something is put into it."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync_folder(folder.parent)


def temporary_sibling(target: Path) -> Path:
    return target.with_name(f".tmp-{uuid.uuid4().hex}")


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_folder(folder: Path) -> None:
    """Puts new names on disk. A file system that cannot (some network ones) does it by itself, or never."""
    try:
        fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def on_disk(path: Path, doing: str) -> contextlib.AbstractContextManager[None]:
    """Turns what a file system raises inside a ``with`` into one of our errors, with the path in it."""
    return translated_errors(str(path), doing)


@contextlib.contextmanager
def scratch_folder() -> Generator[Path]:
    """A local folder of one's own for the length of a ``with``.

    Raises:
        StorageError: what was done inside filled the disk.
    """
    with temporary_folder() as folder:
        try:
            yield Path(folder)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise disk_full(error, folder, "write scratch files") from error
