"""Every byte that is read or written goes through here: allowed URLs, whole-object writes, create-if-absent.

Writes are never streamed into their final name: an exception inside an fsspec or Arrow output stream publishes what
was written so far. A writer makes a local temporary file, closes it, and ``put`` publishes it in one step.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Generator
from pathlib import Path
from typing import Any

import fsspec
from braceexpand import braceexpand
from filelock import FileLock

from pipeline.errors import StorageError, StorageInputError

WRITABLE = ("file", "memory", "s3", "gs", "gcs", "az", "abfs", "abfss")
READABLE = (*WRITABLE, "http", "https", "hf")
_EXTRA = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure", "hf": "hf"}
_memory_lock = threading.Lock()


def protocol(url: str) -> str:
    """The URL's protocol, ``file`` for a bare path.

    Raises:
        StorageInputError: the protocol is not on the allow-list, or the URL is chained or runs a command.
    """
    head, sep, _ = url.partition("://")
    name = head.lower() if sep else "file"
    runs_a_command = not sep and url.split("/", 1)[0].lower().startswith("pipe:")
    if "::" in url or runs_a_command or name not in READABLE or "\0" in url or not url.strip():
        raise StorageInputError(
            "this URL is refused",
            where=redact(url),
            got="a chained URL" if "::" in url else f"protocol {('pipe' if runs_a_command else name)!r}",
            wanted=f"a path, or one of {', '.join(READABLE)}",
            next_step="give a plain URL; commands and chained URLs are never run",
        )
    return name


def redact(url: str) -> str:
    """The URL without user, password and query, fit for a message or a manifest."""
    head, sep, tail = url.partition("://")
    if not sep:
        return url
    tail = tail.split("?", 1)[0].split("#", 1)[0]
    authority, slash, path = tail.partition("/")
    return f"{head}://{authority.rpartition('@')[2]}{slash}{path}"


def join(base: str, *parts: str) -> str:
    """``base/part/…`` for a path or a URL."""
    return "/".join([base.rstrip("/"), *parts])


def absolute(url: str) -> str:
    """A bare path made absolute; a URL as it is. Relative paths mean nothing on another process's working directory."""
    return str(Path(url).absolute()) if protocol(url) == "file" and "://" not in url else url


def expand(patterns: str | tuple[str, ...]) -> list[str]:
    """Brace patterns to URLs, in the order written; every URL checked against the allow-list."""
    urls: list[str] = []
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        try:
            urls.extend(braceexpand(pattern))
        except ValueError as error:
            raise StorageInputError(
                "a brace in this pattern is not closed", where=redact(pattern), wanted="…{00000..00009}.tar"
            ) from error
    for url in urls:
        protocol(url)
    return urls


def _filesystem(url: str) -> tuple[Any, str]:
    name = protocol(url)
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise StorageInputError(
            f"{name}:// needs a package that is not installed",
            where=redact(url),
            got=str(error),
            next_step=f"pip install 'stillroom[{_EXTRA.get(name, name)}]'",
        ) from error
    return filesystem, path


def _writable(url: str) -> tuple[Any, str]:
    if protocol(url) not in WRITABLE:
        raise StorageInputError(
            "this protocol is read-only", where=redact(url), got=protocol(url), wanted=f"one of {', '.join(WRITABLE)}"
        )
    return _filesystem(url)


@contextlib.contextmanager
def _told(url: str, doing: str) -> Generator[None]:
    """Turns what a storage library raises into one of our errors, with the URL in it."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise StorageInputError(f"cannot {doing}: there is no such file", where=redact(url)) from error
    except PermissionError as error:
        raise StorageInputError(f"cannot {doing}: permission denied", where=redact(url)) from error
    except OSError as error:
        raise StorageError(f"cannot {doing}", where=redact(url), got=f"{type(error).__name__}: {error}") from error


def exists(url: str) -> bool:
    filesystem, path = _filesystem(url)
    with _told(url, "look for"):
        return bool(filesystem.isfile(path))


def size(url: str) -> int:
    """Size in bytes."""
    filesystem, path = _filesystem(url)
    with _told(url, "stat"):
        return int(filesystem.size(path))


def read(url: str) -> bytes:
    """The whole object."""
    filesystem, path = _filesystem(url)
    with _told(url, "read"):
        return bytes(filesystem.cat_file(path))


def read_range(url: str, offset: int, size_bytes: int) -> bytes:
    """Exactly ``size_bytes`` from ``offset``; a shorter object is an error, never a short answer."""
    filesystem, path = _filesystem(url)
    with _told(url, "read"):
        data = bytes(filesystem.cat_file(path, start=offset, end=offset + size_bytes))
    if len(data) != size_bytes:
        raise StorageError(
            "the object is shorter than its commit says",
            where=redact(url),
            got=f"{len(data)} bytes from {offset}",
            wanted=f"{size_bytes} bytes",
        )
    return data


def listing(url: str) -> list[str]:
    """Paths relative to ``url`` of every object below it, sorted; empty where the folder is absent."""
    filesystem, path = _filesystem(url)
    with _told(url, "list"):
        if not filesystem.exists(path):
            return []
        filesystem.invalidate_cache(path)
        found = filesystem.find(path)
    base = path.rstrip("/") + "/"
    return sorted(name[len(base) :] for name in found if name.startswith(base) and not _is_temporary(name))


def _is_temporary(name: str) -> bool:
    return name.rsplit("/", 1)[-1].startswith(".tmp-")


def put(local: Path, url: str) -> None:
    """Publishes a closed local file under ``url``: one replace on a file system, one upload on an object store."""
    filesystem, path = _writable(url)
    with _told(url, "write"):
        if protocol(url) != "file":
            filesystem.put_file(str(local), path)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = _scratch_beside(target)
        try:
            shutil.copyfile(local, scratch)
            _fsync(scratch)
            scratch.replace(target)
        finally:
            scratch.unlink(missing_ok=True)


def write(url: str, data: bytes) -> None:
    """Publishes bytes under ``url``, replacing what was there."""
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "object"
        local.write_bytes(data)
        put(local, url)


def create(url: str, data: bytes) -> bool:
    """Publishes bytes only where nothing is. True if this call did it; False if another was first.

    Raises:
        StorageInputError: the store offers no conditional create that is implemented here.
    """
    filesystem, path = _writable(url)
    name = protocol(url)
    with _told(url, "create"):
        if name == "file":
            return _create_file(Path(path), data)
        if name == "memory":
            with _memory_lock:
                if filesystem.exists(path):
                    return False
                filesystem.pipe_file(path, data)
                return True
        if name == "s3":
            try:
                # s3fs turns this mode into PutObject with If-None-Match: *, which the store decides atomically.
                filesystem.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
            return True
    raise StorageInputError(
        "this store has no create-if-absent here yet",
        where=redact(url),
        got=name,
        wanted="file, memory or s3 for caches and runs",
        next_step="write to one of these; reading from it works",
    )


def _create_file(target: Path, data: bytes) -> bool:
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = _scratch_beside(target)
    try:
        scratch.write_bytes(data)
        _fsync(scratch)
        # A hard link either appears with all its bytes or not at all, also over NFS.
        os.link(scratch, target)
    except FileExistsError:
        return False
    finally:
        scratch.unlink(missing_ok=True)
    return True


def _scratch_beside(target: Path) -> Path:
    return target.with_name(f".tmp-{uuid.uuid4().hex}")


def _fsync(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def delete(url: str) -> None:
    """Removes one object; an absent one is fine, since another builder may have been first."""
    filesystem, path = _writable(url)
    with contextlib.suppress(FileNotFoundError), _told(url, "delete"):
        try:
            filesystem.rm_file(path)
        except FileNotFoundError:
            return


def local_copy(url: str, folder: Path) -> Path:
    """A local path with the object's bytes: itself if it is local, else a copy in ``folder``, fetched once a node.

    Safe among processes: one downloads under a lock, the others wait and find it.
    """
    filesystem, path = _filesystem(url)
    if protocol(url) == "file":
        if not Path(path).is_file():
            raise StorageInputError("cannot read: there is no such file", where=url)
        return Path(path)
    size_bytes = size(url)
    name = hashlib.sha256(f"{url}\n{size_bytes}".encode()).hexdigest()[:24]
    target = folder / f"{name}-{path.rsplit('/', 1)[-1]}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if not target.exists():
            scratch = _scratch_beside(target)
            with _told(url, "fetch"):
                filesystem.get_file(path, str(scratch))
            if scratch.stat().st_size != size_bytes:
                scratch.unlink()
                raise StorageError("the download was cut short", where=redact(url), wanted=f"{size_bytes} bytes")
            scratch.replace(target)
    return target
