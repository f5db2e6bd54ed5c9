"""Files that a node stores for all its training processes: copies of remote shards, and views of caches to be mapped.

One folder, one byte limit. The first process that needs a file creates it; the others wait. It is written under another
name and renamed when it is complete, so a file under its final name is never partial. The least recently used file is
removed first.

All state is in the files, so nothing can disagree with them: sizes and times of use are the file system's, and a
process locks each file that it uses (``flock``); the kernel releases the lock with the process. A file in use is not
removed: it would still take its space, and the next process would create it again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pipeline import storage
from pipeline.core.errors import StorageInputError
from schemas.config import DataConfig

Fill = Callable[[Path], None]
"""Fills an existing file, in place."""

TEMPORARY = Path(tempfile.gettempdir())
"""The default of ``data.local_dir``."""

_NAME = re.compile(r"(?:\.part-(?P<reserved>\d+)-)?[0-9a-f]{24}-.+")
_SHARE_OF_FREE = 0.8
_POLL_S = 0.02


def name_of(key: str, label: str) -> str:
    """The name of the file that ``key`` identifies; ``label`` is for readers of the folder."""
    return f"{hashlib.sha256(key.encode()).hexdigest()[:24]}-{storage.short_name(label)}"


@dataclass(frozen=True, slots=True)
class CacheLease:
    """A file that is not removed until the lease is closed.

    Attributes:
        store: None: the file is no copy of a store.
        over_budget: the files in use on this node exceed the limit; close other leases where possible.
    """

    path: Path
    store: NodeStore | None = None
    descriptor: int = -1
    over_budget: bool = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the file. Memory that was mapped stays readable."""
        if self.store is None:
            return
        os.close(self.descriptor)
        if self.over_budget:
            self.store.shrink()

    def discard(self) -> None:
        """Releases and removes a copy whose bytes are wrong, so that the next lease gets a new one."""
        if self.store is not None and _is_named(self.descriptor, self.path):
            self.path.unlink(missing_ok=True)
        self.close()


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    size_bytes: int
    used_ns: int
    is_part: bool


@dataclass(frozen=True, slots=True)
class NodeStore:
    """
    Attributes:
        limit_bytes: None: four fifths of the disk's free bytes and those of the store.
    """

    folder: Path
    limit_bytes: int | None = None

    @classmethod
    def of(cls, data: DataConfig) -> NodeStore:
        """A folder in ``data.local_dir`` that belongs to this user, since a student trains on its content."""
        parent = TEMPORARY if data.local_dir is None else Path(storage.expand_home(data.local_dir))
        return cls(parent / f"stillroom-{os.geteuid()}", data.local_bytes)

    def acquire_url(self, url: str) -> CacheLease:
        """A file with the object's bytes: the object itself if it is local, else a copy.

        Raises:
            StorageError, StorageInputError: it cannot be read, or the disk is full.
        """
        size_bytes = storage.size(url)
        local = storage.local_path(url)
        if local is not None:
            return CacheLease(local)
        # The size shows whether the object was replaced; for an equal size, readers of images compare contents.
        name = name_of(f"{url}\n{size_bytes}", storage.last_name(url))

        def fetch(part: Path) -> None:
            storage.download(url, part, size_bytes)

        lease = self.acquire(name, size_bytes, fetch)
        if lease.path.stat().st_size == size_bytes:
            return lease
        # A node lost its power: files are renamed when complete, and not forced to the disk.
        lease.discard()
        return self.acquire(name, size_bytes, fetch)

    def acquire(self, name: str, size_bytes: int, fill: Fill) -> CacheLease:
        """The file of this name (``name_of``), created if it does not exist.

        Args:
            size_bytes: its approximate size; that much space is freed first.

        Raises:
            StorageInputError: the folder is another user's, or cannot be written to.
            StorageError: the disk is full.
        """
        with storage.on_disk(self.folder, "store a file"):
            self._prepare()
            while True:
                lease = self._lease(name) or self._create(name, size_bytes, fill)
                # None: another process finished or removed the file meanwhile.
                if lease is not None:
                    return lease

    def _prepare(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        owner = self.folder.stat().st_uid
        if owner != os.geteuid():
            raise StorageInputError(
                "this folder belongs to another user, who could change the training data",
                code="storage.foreign-folder",
                where=str(self.folder),
                got=f"user {owner}",
                expected=f"user {os.geteuid()}",
                next_step="set data.local_dir to a folder that belongs to you",
            )

    def _lease(self, name: str) -> CacheLease | None:
        path = self.folder / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return self._used(path, descriptor, over_budget=False)

    def _used(self, path: Path, descriptor: int, *, over_budget: bool) -> CacheLease | None:
        """The lease of a locked file; None if it was removed before it was locked."""
        if os.fstat(descriptor).st_nlink == 0:
            os.close(descriptor)
            return None
        now = time.time_ns()
        # In nanoseconds: the kernel's clock for files has steps of some milliseconds.
        os.utime(descriptor, ns=(now, now))
        return CacheLease(path, self, descriptor, over_budget)

    def _create(self, name: str, size_bytes: int, fill: Fill) -> CacheLease | None:
        """The partial file is locked while it is filled: a killed process leaves it unlocked, and the next fills it."""
        part = self.folder / f".part-{size_bytes}-{name}"
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not _claimed(descriptor, part):
            os.close(descriptor)
            return None
        try:
            if (self.folder / name).exists():
                part.unlink()
                _release(descriptor)
                return None
            # Its name contains its final size, so that all processes that make room now count it.
            fits = self.shrink()
            fill(part)
            part.rename(self.folder / name)
        except BaseException:
            part.unlink(missing_ok=True)
            _release(descriptor)
            raise
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_size > size_bytes:
            fits = self.shrink()
        return self._used(self.folder / name, descriptor, over_budget=not fits)

    def shrink(self) -> bool:
        """Removes unused files, least recently used first, until the limit holds. Returns whether it does."""
        with self._exclusive():
            files = [file for file in self._files() if not (file.is_part and _removed(file.path))]
            total = sum(file.size_bytes for file in files)
            limit = self._limit(total)
            for file in sorted(files, key=lambda file: file.used_ns):
                if total <= limit:
                    break
                if not file.is_part and _removed(file.path):
                    total -= file.size_bytes
            return total <= limit

    def limit(self) -> int:
        """Bytes that the store may take now."""
        with storage.on_disk(self.folder, "store files"):
            self._prepare()
            return self._limit(sum(file.size_bytes for file in self._files()))

    def _limit(self, used_bytes: int) -> int:
        if self.limit_bytes is not None:
            return self.limit_bytes
        return int(_SHARE_OF_FREE * (used_bytes + shutil.disk_usage(self.folder).free))

    @contextmanager
    def _exclusive(self) -> Generator[None]:
        """Two processes that freed space at the same time would remove twice as much."""
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            _release(descriptor)

    def _files(self) -> Iterator[_File]:
        """The store's files in the folder, without those that are removed meanwhile."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if (match := _NAME.fullmatch(entry.name)) is None:
                    continue
                try:
                    info = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                reserved = match["reserved"]
                size_bytes = max(info.st_size, int(reserved or 0))
                yield _File(Path(entry.path), size_bytes, info.st_mtime_ns, reserved is not None)


def _claimed(descriptor: int, part: Path) -> bool:
    """Whether this process may fill the partial file: it has locked it, and the name still refers to it."""
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Polled: the process that created the file holds a shared lock as long as it uses it.
            if not _is_named(descriptor, part):
                return False
            time.sleep(_POLL_S)
        else:
            return _is_named(descriptor, part)


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _release(descriptor: int) -> None:
    # Closing alone would leave the lock with a process that was forked meanwhile.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _removed(path: Path) -> bool:
    """Removes a file unless a process uses it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    # The name may refer to another file by now.
    if named := _is_named(descriptor, path):
        path.unlink()
    _release(descriptor)
    return named
