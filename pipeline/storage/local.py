"""Paths and scratch folders of this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterable
from pathlib import Path

from pipeline.core.errors import StorageInputError
from pipeline.core.redaction import redact
from pipeline.core.temporary import temporary_folder
from pipeline.storage.failures import DISK_FULL, disk_full, translated_errors
from pipeline.storage.stores import open_filesystem
from pipeline.storage.urls import NAME_TOO_LONG, protocol


def local_path(url: str) -> Path | None:
    """The path of a file of this machine; None for other stores."""
    return Path(open_filesystem(url)[1]) if protocol(url) == "file" else None


def local_folder(url: str) -> Path | None:
    """The nearest existing folder of this machine that contains the objects of ``url``; None for other stores."""
    path = local_path(url)
    return None if path is None else next(folder for folder in (path, *path.parents) if folder.is_dir())


def check_names(folder_url: str, names: Iterable[str]) -> None:
    """Refuses, before any work, file names that a folder of this machine cannot have. Writes nothing.

    Raises:
        StorageInputError: a name is longer than its file system allows.
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
        expected=f"at most {limit} bytes, including the suffix that is added to the name of a shard",
        next_step="rename the shard",
    )


def on_disk(path: Path, action: str) -> contextlib.AbstractContextManager[None]:
    """Turns errors of the file system inside a ``with`` into errors of the project, with the path in them."""
    return translated_errors(str(path), action)


@contextlib.contextmanager
def scratch_folder() -> Generator[Path]:
    """A new local folder for the length of a ``with``.

    Raises:
        StorageError: the code inside filled the disk.
    """
    with temporary_folder() as folder:
        try:
            yield Path(folder)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise disk_full(error, folder, "write scratch files") from error
