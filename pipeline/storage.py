"""Every byte that is read or written goes through here: allowed URLs, whole-object writes, create-if-absent.

Writes are never streamed into their final name: an exception inside an fsspec or Arrow output stream publishes what
was written so far. A writer makes a local temporary file, closes it, and ``put`` publishes it in one step.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
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

from pipeline.errors import StillroomError, StorageError, StorageInputError

WRITABLE = ("file", "memory", "s3", "gs", "gcs", "az", "abfs", "abfss")
READABLE = (*WRITABLE, "http", "https", "hf")
_EXTRA = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure", "hf": "hf"}
# What these packages raise is seldom an OSError.
_LIBRARIES = (
    *("botocore", "aiobotocore", "s3fs", "google", "gcsfs", "azure", "adlfs", "huggingface_hub"),
    *("aiohttp", "httpx", "httpcore", "requests", "urllib3"),
)
_NO_CREDENTIALS = re.compile(
    r"Credential|Authentication|TokenRetrieval|TokenLoad|SSOToken|ProfileNotFound|RefreshError"
)
_NO_CONNECTION = re.compile(
    r"Connector|ConnectionRefused|EndpointConnection|ProxyConnection|ConnectTimeout|ConnectError"
)
_SCHEME_WITHOUT_SLASHES = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(?!//)")
_memory_lock = threading.Lock()


def protocol(url: str) -> str:
    """The URL's protocol, ``file`` for a bare path.

    Raises:
        StorageInputError: the protocol is not on the allow-list, or the URL is empty, chained, runs a command, lacks
            the slashes after its protocol, or names no bucket.
    """
    head, sep, tail = url.partition("://")
    name = head.lower() if sep else "file"
    if not url.strip():
        raise _refused(url, got="an empty URL", next_step="name a file or a folder")
    if "::" in url:
        raise _refused(url, got="a chained URL", next_step="give a plain URL; commands and chained URLs are never run")
    if not sep and (scheme := _SCHEME_WITHOUT_SLASHES.match(url)):
        got = f"{scheme[0]!r} without the two slashes of a URL"
        raise _refused(url, got=got, next_step="write PROTOCOL://…, or ./ before a path that has a colon in its name")
    if name not in READABLE or "\0" in url:
        got = "a zero byte" if "\0" in url else f"protocol {name!r}"
        raise _refused(url, got=got, next_step="give a plain URL; commands and chained URLs are never run")
    if name not in ("file", "memory") and not tail.partition("/")[0].rpartition("@")[2]:
        raise _refused(url, got=f"{name}:// without a bucket or host", next_step=f"write {name}://NAME/…")
    return name


def _refused(url: str, *, got: str, next_step: str) -> StorageInputError:
    wanted = f"a path, or one of {', '.join(READABLE)}"
    return StorageInputError("this URL is refused", where=redact(url), got=got, wanted=wanted, next_step=next_step)


def redact(url: str) -> str:
    """The URL without user, password and query, fit for a message or a manifest."""
    head, sep, tail = url.partition("://")
    if not sep:
        return url
    tail = tail.split("?", 1)[0].split("#", 1)[0]
    authority, slash, path = tail.partition("/")
    return f"{head}://{authority.rpartition('@')[2]}{slash}{path}"


def join(base: str, *parts: str) -> str:
    """``base/part/…`` for a path or a URL; the slashes of a bare ``s3://`` stay."""
    head, sep, tail = base.rpartition("://")
    return "/".join([head + sep + tail.rstrip("/"), *parts])


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
        with _told(url, "open"):
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
    except StillroomError:
        raise
    except Exception as error:
        told = _translated(_truth(error), url, doing)
        if told is None:
            raise
        raise told from error


def _truth(error: Exception) -> Exception:
    """fsspec calls whatever fails over HTTP a missing file; its cause tells what happened."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    failed = _package(cause) == "aiohttp" or (_package(cause) == "builtins" and isinstance(cause, OSError))
    missing = isinstance(cause, FileNotFoundError) or _status(cause) == 404
    return cause if failed and not missing else error


def _package(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _status(error: BaseException) -> int | None:
    """The HTTP status by whichever name this library gives it."""
    found = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    return next((status for status in found if isinstance(status, int)), None)


def _translated(error: Exception, url: str, doing: str) -> StorageError | StorageInputError | None:
    """Our error for what a storage library raised; None where it is none of theirs, and so a bug of ours."""
    where, name = redact(url), type(error).__name__
    of_library = _package(error) in _LIBRARIES
    origin = error.__cause__ or error.__context__
    of_argument = isinstance(error, ValueError) and origin is not None and _package(origin) in _LIBRARIES
    if not (of_library or of_argument or isinstance(error, OSError)):
        return None
    got = f"{name}: {_without_secrets(str(error))}"
    if of_library and _NO_CREDENTIALS.search(name):
        next_step = "set the credentials of this store in the environment or in its configuration file, and try again"
        return StorageInputError(f"cannot {doing}: no valid credentials", where=where, got=got, next_step=next_step)
    if isinstance(error, PermissionError) or (of_library and _status(error) in (401, 403)):
        return StorageInputError(f"cannot {doing}: permission denied", where=where)
    if _NO_CONNECTION.search(name):
        return StorageError(f"cannot {doing}: could not connect", where=where, got=got)
    if (reason := _wrong_path(error)) is not None:
        return StorageInputError(f"cannot {doing}: {reason}", where=where, next_step=_glob_hint(error, where))
    if of_argument:
        return StorageInputError(f"cannot {doing}: the store does not take this name", where=where, got=got)
    return StorageError(f"cannot {doing}", where=where, got=got)


def _wrong_path(error: Exception) -> str | None:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "this is a folder"
    if isinstance(error, (NotADirectoryError, FileExistsError)):
        return "a part of this path is a file"
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return "this file system is read-only"
    return None


def _glob_hint(error: Exception, path: str) -> str | None:
    if isinstance(error, FileNotFoundError) and re.search(r"[*?\[]", path):
        return "globs are not expanded; use braces, as in {00000..00009}"
    return None


def _without_secrets(text: str) -> str:
    return re.sub(r"\w+://[^\s'\"]+", lambda found: redact(found[0]), text)


def exists(url: str) -> bool:
    """Whether a file is there now; a store that cannot tell is an error, never an absent file."""
    filesystem, path = _filesystem(url)
    with _told(url, "look for"):
        found = _info(filesystem, path)
        return found is not None and found["type"] == "file"


def _info(filesystem: Any, path: str) -> dict[str, Any] | None:
    """What the store says of a path now, past any cached listing, or None where nothing is."""
    # fsspec's own exists and isfile answer False to every exception, also to a refused or throttled request.
    filesystem.invalidate_cache(path.rstrip("/").rpartition("/")[0])
    try:
        return dict(filesystem.info(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        if _truth(error) is not error:
            raise
        return None


def size(url: str) -> int:
    """Size in bytes."""
    filesystem, path = _filesystem(url)
    with _told(url, "stat"):
        return _file_size(filesystem, path)


def _file_size(filesystem: Any, path: str) -> int:
    found = filesystem.info(path)
    if found["type"] == "directory":
        raise IsADirectoryError(path)
    if found["type"] != "file":
        raise FileNotFoundError(path)
    if found["size"] is None:
        raise OSError("the server does not tell the size")
    return int(found["size"])


def read(url: str) -> bytes:
    """The whole object."""
    filesystem, path = _filesystem(url)
    with _told(url, "read"):
        try:
            return bytes(filesystem.cat_file(path))
        except FileNotFoundError:
            # An object store has no folders, and calls a prefix missing.
            if filesystem.isdir(path):
                raise IsADirectoryError(path) from None
            raise


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
        if _info(filesystem, path) is None:
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
    with _told(url, "read"):
        size_bytes = _file_size(filesystem, path)
    if protocol(url) == "file":
        return Path(path)
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
