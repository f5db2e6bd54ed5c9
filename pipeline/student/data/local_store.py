"""Files that a node keeps for all training processes on it: copies of remote shards, and views of caches to be mapped.

One folder, one byte limit. A file is made once, by who asks first; the others wait. It is written under a name of its
own and renamed when it is whole, so a file under its final name is never half of one. What was used longest ago goes
first.

There is no record beside the files, so nothing can disagree with them: sizes and times of use are the file system's,
and who is at work with a file has it locked (``flock``), which the kernel ends with the process. A file in use is not
removed: it would still take its space, and the next process would make it once more.
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

Make = Callable[[Path], None]
"""Fills a file that is there, in place."""

TEMPORARY = Path(tempfile.gettempdir())
"""Where ``data.local_dir`` is not given."""

_NAME = re.compile(r"(?:\.part-(?P<reserved>\d+)-)?[0-9a-f]{24}-.+")
_SHARE_OF_FREE = 0.8
_POLL_S = 0.02


def name_of(key: str, label: str) -> str:
    """The file's name for what ``key`` identifies; ``label`` is for who looks into the folder."""
    return f"{hashlib.sha256(key.encode()).hexdigest()[:24]}-{storage.short_name(label)}"


@dataclass(frozen=True, slots=True)
class CacheLease:
    """A file that stays where it is until it is let go of."""

    path: Path
    store: NodeStore | None = None
    """None: not a copy of ours."""
    descriptor: int = -1
    crowded: bool = False
    """What is in use on this node takes more than the limit: who can should let go of other files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go. Memory that was mapped stays readable."""
        if self.store is None:
            return
        os.close(self.descriptor)
        if self.crowded:
            self.store.shrink()

    def discard(self) -> None:
        """Lets go of a copy that turned out wrong, so that the next who asks gets a new one."""
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
    """``limit_bytes`` of None is four fifths of what the disk has for it: what is free and what is here."""

    folder: Path
    limit_bytes: int | None = None

    @classmethod
    def of(cls, data: DataConfig) -> NodeStore:
        """A user's own folder in ``data.local_dir``: what others put into it would be learnt."""
        parent = TEMPORARY if data.local_dir is None else Path(storage.expand_home(data.local_dir))
        return cls(parent / f"stillroom-{os.geteuid()}", data.local_bytes)

    def acquire_url(self, url: str) -> CacheLease:
        """The object's bytes: itself if it is local, else a copy.

        Raises:
            StorageError, StorageInputError: it cannot be read, or the disk is full.
        """
        size_bytes = storage.size(url)
        local = storage.local_path(url)
        if local is not None:
            return CacheLease(local)
        # The same object again after it was replaced by one of another size. Same sizes are told apart by contents,
        # which readers of images compare.
        name = name_of(f"{url}\n{size_bytes}", storage.last_name(url))

        def fetch(part: Path) -> None:
            storage.download(url, part, size_bytes)

        held = self.acquire(name, size_bytes, fetch)
        if held.path.stat().st_size == size_bytes:
            return held
        # What a node that lost its power leaves behind: files are renamed whole, and not forced to the disk.
        held.discard()
        return self.acquire(name, size_bytes, fetch)

    def acquire(self, name: str, size_bytes: int, make: Make) -> CacheLease:
        """The file of this name (``name_of``), made if it is not there.

        Args:
            size_bytes: about how large it will be; room is made for that before it is.

        Raises:
            StorageInputError: the folder is another user's, or cannot be written to.
            StorageError: the disk is full.
        """
        with storage.on_disk(self.folder, "keep a file"):
            self._prepare()
            while True:
                held = self._find(name) or self._make(name, size_bytes, make)
                # None: others finished, or removed, what we waited for.
                if held is not None:
                    return held

    def _prepare(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        owner = self.folder.stat().st_uid
        if owner != os.geteuid():
            raise StorageInputError(
                "this folder belongs to another user, who could change what is learnt",
                where=str(self.folder),
                got=f"user {owner}",
                expected=f"user {os.geteuid()}",
                next_step="set data.local_dir to a folder of your own",
            )

    def _find(self, name: str) -> CacheLease | None:
        path = self.folder / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return self._used(path, descriptor, crowded=False)

    def _used(self, path: Path, descriptor: int, *, crowded: bool) -> CacheLease | None:
        """Of a locked file; None if it was removed before it was locked."""
        if os.fstat(descriptor).st_nlink == 0:
            os.close(descriptor)
            return None
        now = time.time_ns()
        # Given in full: the kernel's own idea of now has steps of some milliseconds.
        os.utime(descriptor, ns=(now, now))
        return CacheLease(path, self, descriptor, crowded)

    def _make(self, name: str, size_bytes: int, make: Make) -> CacheLease | None:
        """The part is its own lock: who was killed has left it unlocked, and the next one fills it anew."""
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
            # The part's name tells its size to be, so that all who make room at this moment count it.
            fits = self.shrink()
            make(part)
            part.rename(self.folder / name)
        except BaseException:
            part.unlink(missing_ok=True)
            _release(descriptor)
            raise
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_size > size_bytes:
            fits = self.shrink()
        return self._used(self.folder / name, descriptor, crowded=not fits)

    def shrink(self) -> bool:
        """Removes what nobody uses, longest unused first, until the limit is kept. Returns whether it is."""
        with self._alone():
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
        """Bytes that the store may take, as things stand."""
        with storage.on_disk(self.folder, "keep files"):
            self._prepare()
            return self._limit(sum(file.size_bytes for file in self._files()))

    def _limit(self, used_bytes: int) -> int:
        if self.limit_bytes is not None:
            return self.limit_bytes
        return int(_SHARE_OF_FREE * (used_bytes + shutil.disk_usage(self.folder).free))

    @contextmanager
    def _alone(self) -> Generator[None]:
        """Two who made room at the same time would remove twice as much."""
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            _release(descriptor)

    def _files(self) -> Iterator[_File]:
        """What is ours in the folder; a file that goes meanwhile is left out."""
        with os.scandir(self.folder) as found:
            for entry in found:
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
    """Whether the part is ours to fill: locked, and still the one that the name means."""
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Not a wait for the lock: who made it keeps it, shared, as long as it is used.
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
    # Closing alone would leave the lock to a process that was forked meanwhile.
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _removed(path: Path) -> bool:
    """Removes a file unless somebody uses it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    # The name may mean another file by now.
    if named := _is_named(descriptor, path):
        path.unlink()
    _release(descriptor)
    return named
