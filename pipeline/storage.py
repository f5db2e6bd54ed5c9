"""Every byte that is read or written goes through here: allowed URLs, whole-object writes, create-if-absent.

Writes are never streamed into their final name: an exception inside an fsspec or Arrow output stream publishes what
was written so far. A writer makes a local temporary file, closes it, and ``put`` publishes it in one step.

Every operation may be repeated, so what may pass by itself (throttling, a lost connection, a short answer) is tried
again here, a few times within a minute; what a caller sees has lasted. See ``_repeated``.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import datetime as dt
import errno
import hashlib
import logging
import math
import os
import re
import shutil
import sys
import threading
import uuid
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import fsspec
from braceexpand import braceexpand
from filelock import FileLock
from tenacity import (
    before_sleep_log,
    retry,
    retry_if_exception_type,
    stop_after_attempt,
    stop_before_delay,
    wait_random_exponential,
)

from pipeline.errors import (
    MissingPackageError,
    PassingStorageError,
    StillroomError,
    StorageError,
    StorageInputError,
    TooLargeError,
)
from pipeline.redaction import redact
from pipeline.scratch import temporary_folder

P = ParamSpec("P")
R = TypeVar("R")
_log = logging.getLogger(__name__)

MISSING_FILE = "storage.missing-file"
"""Code of the error of a file that is read and not there."""
NAME_TOO_LONG = "storage.name-too-long"
"""Code of the error of a name that a file system cannot hold."""
NAMES_A_PAGE = 1000
"""A store tells so many names with their sizes in one answer."""
# Of files that are read whole, whoever wrote them. A header of 100,000 classes has 8 MB; the table of parts of 100,000
# shards with 100 views, and class means of 100,000 classes with 4,096 numbers, about 1 GB.
MAX_RECORD_BYTES = 32 * 2**20
MAX_TABLE_BYTES = 4 * 2**30

WRITABLE = ("file", "memory", "s3", "gs", "gcs", "az", "abfs", "abfss")
READABLE = (*WRITABLE, "http", "https", "hf")
_EXTRA = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure", "hf": "hf"}
# What these packages raise is seldom an OSError.
_LIBRARIES = (
    *("botocore", "aiobotocore", "s3fs", "google", "gcsfs", "azure", "adlfs", "huggingface_hub"),
    *("aiohttp", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"),
)
_NO_CREDENTIALS = re.compile(
    r"Credential|Authentication|TokenRetrieval|TokenLoad|SSOToken|ProfileNotFound|RefreshError"
)
_NO_CONNECTION = re.compile(
    r"Connector|ConnectionRefused|EndpointConnection|ProxyConnection|ConnectTimeout|ConnectError"
)
# botocore, of an endpoint without a scheme or host.
_BAD_ENDPOINT = re.compile(r"Invalid endpoint: (.*)|Custom endpoint `(.*)` was not a valid URI")
# S3 answers these with a status that elsewhere means a wrong request. NoSuchUpload: the answer to the end of a
# multipart upload was lost, and its repetition finds the upload gone; a new upload is right.
_PASSING_CODES = frozenset(
    {
        *("BadDigest", "ConditionalRequestConflict", "IncompleteBody", "NoSuchUpload", "OperationAborted"),
        *("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "XAmzContentSHA256Mismatch"),
    }
)
_PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 507, 509, 529})
_PASSING_ERRNO = frozenset(
    {
        *(errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ENOLCK),
        *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    }
)
_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# What a file system answers to an operation that it does not have.
_NOT_SUPPORTED = frozenset({errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
# From <linux/fcntl.h> and <linux/fs.h>.
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
_MAX_ATTEMPTS = 5
_MAX_REPEATING_S = 60
# Full jitter: many tasks that were throttled together come back apart.
_PAUSE = wait_random_exponential(multiplier=0.2, max=8)
# One request up to twice this size, else parts of it, a few at a time: bounds the memory of an upload.
_S3_CHUNK_BYTES, _S3_CONCURRENCY = 32 * 2**20, 4
# A CRC of the whole object, which the store computes from what arrived and refuses if it differs. Of the algorithms
# that botocore has without a native extension, S3 folds only this one over the parts of a multipart upload.
_S3_CHECKSUM = {"ChecksumAlgorithm": "CRC32", "ChecksumType": "FULL_OBJECT"}
# What is larger is fetched in pieces of this size, several at a time, after one request that tells how large it is.
_S3_FETCH_BYTES = 50 * 2**20
_READ_BLOCK_BYTES = 2**20
_MAX_LABEL_BYTES = 100
_PATH_ALTERNATIVES = re.compile(r"\{[^}]*[/~]")
_SCHEME_WITHOUT_SLASHES = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(?!//)")
_memory_lock = threading.Lock()


def _repeated(operation: Callable[P, R]) -> Callable[P, R]:
    """Tries again what may pass, with growing random pauses. ``operation`` is idempotent, and never inside another."""
    return retry(
        retry=retry_if_exception_type(PassingStorageError),
        stop=stop_after_attempt(_MAX_ATTEMPTS) | stop_before_delay(_MAX_REPEATING_S),
        wait=_PAUSE,
        before_sleep=before_sleep_log(_log, logging.INFO),
        reraise=True,
    )(operation)


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
    if sep and head != name:
        next_step = f"write {name}:// in lower case"
        raise _refused(url, got=f"protocol {head!r}", next_step=next_step, code="storage.scheme-not-lower-case")
    if name == "file" and sep and not tail.startswith("/"):
        got, next_step = f"file:// with a host, {tail.partition('/')[0]!r}", "write file:///PATH, or the path alone"
        raise _refused(url, got=got, next_step=next_step, code="storage.file-url-with-host")
    if name not in ("file", "memory") and not tail.partition("/")[0].rpartition("@")[2]:
        raise _refused(url, got=f"{name}:// without a bucket or host", next_step=f"write {name}://NAME/…")
    return name


def _refused(url: str, *, got: str, next_step: str, code: str | None = None) -> StorageInputError:
    wanted = f"a path, or one of {', '.join(READABLE)}"
    return StorageInputError(
        "this URL is refused", code=code, where=redact(url), got=got, wanted=wanted, next_step=next_step
    )


def join(base: str, *parts: str) -> str:
    """``base/part/…`` for a path or a URL; the slashes of a bare ``s3://`` stay.

    Raises:
        StorageInputError: a part leads out of ``base``. Names of files also come from files, whoever wrote those.
    """
    if any(name == ".." for part in parts for name in part.split("/")):
        raise StorageInputError(
            "this path leads out of its folder", where=redact(base), got="/".join(parts), wanted="no .. in it"
        )
    head, sep, tail = base.rpartition("://")
    return "/".join([head + sep + tail.rstrip("/"), *parts])


def last_name(url: str) -> str:
    """What a URL is called in lines about it: its last name, without what ``redact`` takes away."""
    return redact(url).rstrip("/").rpartition("/")[2]


def short_name(name: str) -> str:
    """The end of a name in at most 100 bytes, for names of local copies, which have a prefix and suffixes besides."""
    return name.encode()[-_MAX_LABEL_BYTES:].decode(errors="ignore")


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
        wanted=f"at most {limit} bytes, with what is added to the name of a shard",
        next_step="rename the shard",
    )


def expand_home(path: str) -> str:
    """A path with a leading ``~`` or ``~user`` replaced by that home folder; any other path or URL as it is.

    Raises:
        StorageInputError: the home folder is unknown. Unexpanded, the path would name a folder called ``~``.
    """
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise StorageInputError(
            "the home folder of this path is unknown",
            code="storage.unknown-home",
            where=path,
            got=path.partition("/")[0],
            wanted="~/… with HOME set, or ~USER/… of a user of this machine",
            next_step="write an absolute path, or ./ before a name that begins with ~",
        ) from error


def absolute(url: str) -> str:
    """A bare path made absolute, with ``~`` expanded; a URL as it is. Relative paths mean nothing on another process's
    working directory, and ``~`` may be another user's home there."""
    is_path = protocol(url) == "file" and "://" not in url
    return str(Path(expand_home(url)).absolute()) if is_path else url


def absolute_patterns(patterns: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """The same for brace patterns, unexpanded, because a pattern is short: only alternatives of whole paths or URLs,
    as in ``{~/a,/b}/0.tar``, are expanded, because each is absolute or relative by itself."""
    if isinstance(patterns, tuple):
        return tuple(url for pattern in patterns for url in _as_tuple(absolute_patterns(pattern)))
    if _PATH_ALTERNATIVES.match(patterns):
        return tuple(absolute(url) for url in expand(patterns))
    return absolute(patterns)


def _as_tuple(patterns: str | tuple[str, ...]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else patterns


def expand(patterns: str | tuple[str, ...]) -> list[str]:
    """Brace patterns to URLs, in the order written, with ``~`` expanded; every URL checked against the allow-list."""
    urls: list[str] = []
    for pattern in _as_tuple(patterns):
        try:
            urls.extend(map(expand_home, braceexpand(pattern)))
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
            filesystem, path = fsspec.core.url_to_fs(expand_home(url))
            if name == "s3":
                # botocore repeats single requests (AWS_MAX_ATTEMPTS, AWS_RETRY_MODE), we repeat operations. s3fs in
                # between would multiply both.
                filesystem.retries = 1
    except (ImportError, ValueError) as error:
        # abfss is not even a name to fsspec without its package.
        if isinstance(error, ValueError) and "Protocol not known" not in str(error):
            raise
        package = f"'stillroom[{_EXTRA[name]}]'" if name in _EXTRA else "aiohttp"
        raise MissingPackageError(
            f"{name}:// needs a package that is not installed",
            where=redact(url),
            got=str(error),
            next_step=f"pip install {package} (on every node that reads or writes such URLs)",
        ) from error
    return filesystem, path


def _writable(url: str) -> tuple[Any, str]:
    _check_not_read_only(url)
    return _filesystem(url)


def _check_not_read_only(url: str) -> None:
    if protocol(url) not in WRITABLE:
        raise StorageInputError(
            "this protocol is read-only", where=redact(url), got=protocol(url), wanted=f"one of {', '.join(WRITABLE)}"
        )


def check_writable(url: str) -> None:
    """What can be known without writing.

    Raises:
        StorageInputError: the URL is refused, or its protocol is read-only.
    """
    _writable(url)


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
    if (endpoint := _BAD_ENDPOINT.fullmatch(str(error))) is not None:
        return StorageInputError(
            "the endpoint of this store is not a URL",
            code="storage.endpoint",
            where=where,
            got=endpoint[1] or endpoint[2],
            wanted="http://HOST:PORT or https://HOST",
            next_step="set AWS_ENDPOINT_URL, AWS_ENDPOINT_URL_S3 or endpoint_url of ~/.aws/config to such a URL",
        )
    if not (of_library or of_argument or isinstance(error, OSError)):
        return None
    got = f"{name}: {error}"
    if _error_code(error) in _PASSING_CODES:
        return PassingStorageError(f"cannot {doing}", where=where, got=got)
    if of_library and _NO_CREDENTIALS.search(name):
        next_step = "set the credentials of this store in the environment or in its configuration file, and try again"
        return StorageInputError(f"cannot {doing}: no valid credentials", where=where, got=got, next_step=next_step)
    if isinstance(error, PermissionError) or (of_library and _status(error) in (401, 403)):
        return StorageInputError(f"cannot {doing}: permission denied", where=where)
    if _NO_CONNECTION.search(name):
        kind = PassingStorageError if _may_pass(error) else StorageError
        return kind(f"cannot {doing}: could not connect", where=where, got=got)
    if (reason := _wrong_path(error)) is not None:
        code = MISSING_FILE if isinstance(error, FileNotFoundError) else None
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            code = NAME_TOO_LONG
        return StorageInputError(
            f"cannot {doing}: {reason}", code=code, where=where, next_step=_glob_hint(error, where)
        )
    if of_argument:
        return StorageInputError(f"cannot {doing}: the store does not take this name", where=where, got=got)
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return _disk_full(error, where, doing)
    kind = PassingStorageError if _may_pass(error) else StorageError
    return kind(f"cannot {doing}", where=where, got=got)


def _error_code(error: BaseException) -> str | None:
    """The code in S3's answer; s3fs keeps that as the cause."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: a timeout, a lost connection, a store that is overloaded."""
    if isinstance(error, (TimeoutError, ConnectionError)):
        return True
    response = getattr(error.__cause__, "response", None)
    status = response["ResponseMetadata"].get("HTTPStatusCode") if isinstance(response, dict) else _status(error)
    if status is not None:
        return status in _PASSING_STATUS
    if _package(error) in _LIBRARIES:
        # Bad certificates and URLs are values; the rest is connections and half answers.
        return not isinstance(error, ValueError)
    return isinstance(error, OSError) and error.errno in _PASSING_ERRNO


def _disk_full(error: OSError, where: str, doing: str) -> StorageError:
    return StorageError(
        f"cannot {doing}: no space is left",
        where=where,
        got=f"{type(error).__name__}: {error}",
        next_step="free some space (or set TMPDIR, if it is the scratch folder) and run the command again; it resumes",
    )


def _wrong_path(error: Exception) -> str | None:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "this is a folder"
    if isinstance(error, (NotADirectoryError, FileExistsError)):
        return "a part of this path is a file"
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return "this file system is read-only"
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return "a name in this path is too long for this file system (most take 255 bytes)"
    return None


def _glob_hint(error: Exception, path: str) -> str | None:
    if isinstance(error, FileNotFoundError) and re.search(r"[*?\[]", path):
        return "globs are not expanded; use braces, as in {00000..00009}"
    return None


@_repeated
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


@_repeated
def stamp(url: str) -> str:
    """What the store says of a file now, tag and times included: another text once the file was replaced."""
    filesystem, path = _filesystem(url)
    with _told(url, "stat"):
        filesystem.invalidate_cache(path.rpartition("/")[0])
        return str(sorted(filesystem.info(path).items()))


@_repeated
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


@_repeated
def read(url: str, *, max_bytes: int | None = None) -> bytes:
    """The whole object.

    Raises:
        TooLargeError: it is larger than ``max_bytes``.
    """
    filesystem, path = _filesystem(url)
    with _told(url, "read"):
        try:
            return _whole(filesystem, path, url, max_bytes)
        except FileNotFoundError:
            # An object store has no folders, and calls a prefix missing.
            if filesystem.isdir(path):
                raise IsADirectoryError(path) from None
            raise


@_repeated
def read_if_there(url: str, *, max_bytes: int | None = None) -> bytes | None:
    """The whole object, or None where there is none: one request, where ``exists`` and ``read`` are two or three.

    Raises:
        TooLargeError: it is larger than ``max_bytes``.
    """
    filesystem, path = _filesystem(url)
    with _told(url, "read"):
        try:
            return _whole(filesystem, path, url, max_bytes)
        except (FileNotFoundError, NotADirectoryError) as error:
            if _truth(error) is not error:
                raise
            return None


def _whole(filesystem: Any, path: str, url: str, max_bytes: int | None) -> bytes:
    """What a person mistypes, or a server makes up, may be larger than memory: a limit is held before it is read."""
    if protocol(url) != "s3":
        if max_bytes is not None:
            _check_size(int(filesystem.info(path)["size"] or 0), max_bytes, url)
        return bytes(filesystem.cat_file(path))
    # Left alone, s3fs first asks for the size, to fetch what is large in pieces. Nothing that is read whole is.
    if max_bytes is None:
        return bytes(filesystem.cat_file(path, max_concurrency=1))
    try:
        data = bytes(filesystem.cat_file(path, start=0, end=max_bytes + 1))
    except FileNotFoundError:
        raise
    except OSError:
        # An empty object has no range.
        if filesystem.info(path)["size"] != 0:
            raise
        return b""
    _check_size(len(data), max_bytes, url)
    return data


def _check_size(size_bytes: int, max_bytes: int, url: str) -> None:
    if size_bytes > max_bytes:
        raise TooLargeError(
            "this file is too large for what it should be",
            where=redact(url),
            got=f"{size_bytes} bytes",
            wanted=f"at most {max_bytes} bytes",
        )


@_repeated
def read_range(url: str, offset: int, size_bytes: int) -> bytes:
    """Exactly ``size_bytes`` from ``offset``; a shorter object is an error, never a short answer."""
    filesystem, path = _filesystem(url)
    with _told(url, "read"):
        data = bytes(filesystem.cat_file(path, start=offset, end=offset + size_bytes))
        is_short = len(data) != size_bytes
        is_cut = is_short and _file_size(filesystem, path) >= offset + size_bytes
    if is_cut:
        raise PassingStorageError(
            "the answer was cut short", where=redact(url), got=f"{len(data)} of {size_bytes} bytes"
        )
    if is_short:
        raise StorageError(
            "the object is shorter than its commit says",
            where=redact(url),
            got=f"{len(data)} bytes from {offset}",
            wanted=f"{size_bytes} bytes",
        )
    return data


@dataclass(frozen=True, slots=True)
class Entry:
    """One object below a folder."""

    path: str
    """Relative to the folder."""
    size_bytes: int
    modified_s: float | None
    """Seconds since 1970 by the store's clock; None: the store does not tell."""

    @property
    def is_temporary(self) -> bool:
        """Whether it is what a killed writer left: never a file that was published."""
        return self.path.rsplit("/", 1)[-1].startswith(".tmp-")


@_repeated
def entries(url: str) -> list[Entry]:
    """Every object below ``url`` by path, leftovers of killed writers included; empty where the folder is absent."""
    filesystem, path = _filesystem(url)
    with _told(url, "list"):
        # An object store answers the listing alone; what walks a tree leaves out what it may not read.
        if protocol(url) != "s3" and _info(filesystem, path) is None:
            return []
        filesystem.invalidate_cache(path)
        found = filesystem.find(path, detail=True)
    base = path.rstrip("/") + "/"
    return sorted(
        (
            Entry(name[len(base) :], int(info["size"] or 0), _modified_s(info))
            for name, info in found.items()
            if name.startswith(base)
        ),
        key=lambda entry: entry.path,
    )


def _modified_s(info: Mapping[str, Any]) -> float | None:
    """The time of the last change by whichever name this store gives it."""
    names = ("mtime", "LastModified", "last_modified", "updated", "created")
    found = next((info[name] for name in names if info.get(name) is not None), None)
    if isinstance(found, str):
        found = dt.datetime.fromisoformat(found)
    return found.timestamp() if isinstance(found, dt.datetime) else found


def listing(url: str) -> list[str]:
    """Paths relative to ``url`` of every published object below it, sorted; empty where the folder is absent."""
    return [entry.path for entry in entries(url) if not entry.is_temporary]


def sizes(url: str, *, links_out: bool = False) -> dict[str, int]:
    """Bytes of every object below ``url`` by its relative path, sorted; empty where the folder is absent.

    Local links are followed, to folders too: image trees are often made of them.

    Args:
        links_out: also those that lead out of the folder. Whoever packed it could else have any file of ours read.

    Raises:
        StorageInputError: a link leads out of the folder, or to a folder that it is in.
    """
    if protocol(url) == "file":
        with _told(url, "list"):
            folder = Path(_filesystem(url)[1])
            found = _local_files(folder, None if links_out else folder.resolve(), ())
            return dict(sorted((str(path.relative_to(folder)), path.stat().st_size) for path in found))
    return {entry.path: entry.size_bytes for entry in entries(url)}


def is_listed(url: str, num_names: int) -> bool:
    """Whether ``sizes_right_below`` asks less than a look at each of so many objects: a disk answers at once."""
    return num_names >= NAMES_A_PAGE and protocol(url) in WRITABLE and protocol(url) != "file"


@_repeated
def sizes_right_below(url: str) -> dict[str, int]:
    """Bytes of every object right below ``url`` by its name; empty where the folder is absent."""
    filesystem, path = _filesystem(url)
    with _told(url, "list"):
        filesystem.invalidate_cache(path)
        try:
            found = filesystem.ls(path, detail=True)
        except FileNotFoundError as error:
            if _truth(error) is not error:
                raise
            return {}
        finally:
            # What fsspec keeps of a listing would answer for sizes that are asked later, when they may have changed.
            filesystem.invalidate_cache(path)
    return {info["name"].rsplit("/", 1)[-1]: int(info["size"]) for info in found if info["type"] == "file"}


def _local_files(folder: Path, root: Path | None, above: tuple[Path, ...]) -> Iterator[Path]:
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
                yield from _local_files(path, root, above)
            else:
                yield path


def folders(url: str) -> list[str]:
    """Names of the folders right below ``url``, sorted; empty ones too on a file system, which has such."""
    filesystem, path = _filesystem(url)
    with _told(url, "list"):
        if protocol(url) == "file":
            return sorted(item.name for item in Path(path).iterdir() if item.is_dir())
        filesystem.invalidate_cache(path)
        found = filesystem.ls(path, detail=True)
    return sorted(info["name"].rstrip("/").rsplit("/", 1)[-1] for info in found if info["type"] == "directory")


def local_path(url: str) -> Path | None:
    """The path of a file of this machine; None for other stores."""
    return Path(_filesystem(url)[1]) if protocol(url) == "file" else None


def local_folder(url: str) -> Path | None:
    """The nearest folder of this machine in which the objects of ``url`` lie or would lie; None for other stores."""
    if protocol(url) != "file":
        return None
    path = Path(_filesystem(url)[1])
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


@_repeated
def put(local: Path, url: str) -> None:
    """Publishes a closed local file under ``url``: one replace on a file system, one upload on an object store."""
    filesystem, path = _writable(url)
    name = protocol(url)
    with _told(url, "write"):
        if name == "file":
            _put_file(local, Path(path))
        elif name == "s3":
            _put_s3(filesystem, local, path, where=redact(url))
        else:
            filesystem.put_file(str(local), path)


def _put_file(local: Path, target: Path) -> None:
    _make_folder(target.parent)
    scratch = _scratch_beside(target)
    try:
        shutil.copyfile(local, scratch)
        _fsync(scratch)
        scratch.replace(target)
        _fsync_folder(target.parent)
    finally:
        scratch.unlink(missing_ok=True)


def _put_s3(filesystem: Any, local: Path, path: str, *, where: str) -> None:
    """Uploads with a checksum, and asks what arrived: not every store heeds the checksum."""
    filesystem.put_file(str(local), path, chunksize=_S3_CHUNK_BYTES, max_concurrency=_S3_CONCURRENCY, **_S3_CHECKSUM)
    bucket, key, _ = filesystem.split_path(path)
    stored = filesystem.call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    wanted = {"size": local.stat().st_size, "crc32": _crc32(local)}
    # A store without checksums has none to tell.
    got = {"size": stored["ContentLength"], "crc32": stored.get("ChecksumCRC32", wanted["crc32"])}
    if got != wanted:
        raise PassingStorageError("the store holds other bytes than were sent", where=where, got=got, wanted=wanted)


def num_puts(size_bytes: float) -> int:
    """Requests in which S3 is sent an object: itself, or its beginning, its pieces and its end."""
    return 1 if size_bytes < 2 * _S3_CHUNK_BYTES else 2 + math.ceil(size_bytes / _S3_CHUNK_BYTES)


def num_gets(size_bytes: float) -> int:
    """Requests in which S3 is asked for a copy of an object, after its size."""
    return 1 if size_bytes <= _S3_FETCH_BYTES else 1 + math.ceil(size_bytes / _S3_FETCH_BYTES)


def _crc32(path: Path) -> str:
    """As S3 writes it: base64 of the big-endian word."""
    value = 0
    with path.open("rb") as handle:
        while block := handle.read(_READ_BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return base64.b64encode(value.to_bytes(4, "big")).decode()


def write(url: str, data: bytes) -> None:
    """Publishes bytes under ``url``, replacing what was there."""
    with scratch_folder() as folder:
        local = folder / "object"
        local.write_bytes(data)
        put(local, url)


@_repeated
def create(url: str, data: bytes) -> bool:
    """Publishes bytes only where nothing is. True if they stand now; False if others were first.

    Who finds its own bytes has won too: its first answer was lost, or an equal builder was as fast. Nobody could tell
    the two apart, and nobody has to, since equal bytes mean the same to every reader.

    Raises:
        StorageInputError: the store offers no conditional create that is implemented here.
    """
    _check_not_read_only(url)
    creates = _CREATES.get(protocol(url))
    if creates is None:
        raise StorageInputError(
            "this store has no create-if-absent here yet",
            where=redact(url),
            got=protocol(url),
            wanted="file, memory or s3 for caches and runs",
            next_step="write to one of these; reading from it works",
        )
    filesystem, path = _filesystem(url)
    with _told(url, "create"):
        if creates(filesystem, path, data):
            return True
        try:
            return _whole(filesystem, path, url, None) == data
        except FileNotFoundError as error:
            raise PassingStorageError("what stood here was removed at this moment", where=redact(url)) from error


def _create_file(_: Any, path: str, data: bytes) -> bool:
    target = Path(path)
    if target.is_file():
        return False
    _make_folder(target.parent)
    scratch = _scratch_beside(target)
    try:
        scratch.write_bytes(data)
        _fsync(scratch)
        _publish_new(scratch, target)
        _fsync_folder(target.parent)
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
            wanted="one of the two: local Linux file systems, NFS and most SMB shares have it",
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
        filesystem.pipe_file(path, data, mode="create", **_S3_CHECKSUM)
    except FileExistsError:
        return False
    except OSError as error:
        # Not every store names the condition that failed, as s3fs wants it.
        if _error_code(error) == "PreconditionFailed":
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
    path = Path(_filesystem(url)[1])
    return str(next(folder for folder in (path, *path.parents) if folder.exists()))


def _make_folder(folder: Path) -> None:
    """A folder and what it lacks above it, each entry on disk before something is put into it."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _fsync_folder(folder.parent)


def _scratch_beside(target: Path) -> Path:
    return target.with_name(f".tmp-{uuid.uuid4().hex}")


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fsync_folder(folder: Path) -> None:
    """Puts new names on disk. A file system that cannot (some network ones) does it by itself, or never."""
    try:
        _fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


@_repeated
def delete(url: str) -> None:
    """Removes one object; an absent one is fine, since another builder may have been first."""
    filesystem, path = _writable(url)
    with contextlib.suppress(FileNotFoundError), _told(url, "delete"):
        try:
            filesystem.rm_file(path)
        except FileNotFoundError:
            return


@_repeated
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
    target = folder / f"{name}-{short_name(path.rsplit('/', 1)[-1])}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if not target.exists():
            _fetch(filesystem, path, target, url=url, size_bytes=size_bytes)
    return target


def _fetch(filesystem: Any, path: str, target: Path, *, url: str, size_bytes: int) -> None:
    scratch = _scratch_beside(target)
    try:
        _fill(filesystem, path, scratch, url=url, size_bytes=size_bytes)
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


@_repeated
def download(url: str, target: Path, size_bytes: int) -> None:
    """Fills a local file with the object's bytes, in place; another length than the object's size is an error."""
    filesystem, path = _filesystem(url)
    _fill(filesystem, path, target, url=url, size_bytes=size_bytes)


def _fill(filesystem: Any, path: str, target: Path, *, url: str, size_bytes: int) -> None:
    pieces = {"chunksize": _S3_FETCH_BYTES} if protocol(url) == "s3" else {}
    with _told(url, "fetch"):
        filesystem.get_file(path, str(target), **pieces)
    if target.stat().st_size != size_bytes:
        raise PassingStorageError("the download was cut short", where=redact(url), wanted=f"{size_bytes} bytes")


def on_disk(path: Path, doing: str) -> contextlib.AbstractContextManager[None]:
    """Turns what a file system raises inside a ``with`` into one of our errors, with the path in it."""
    return _told(str(path), doing)


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
            if error.errno not in _DISK_FULL:
                raise
            raise _disk_full(error, folder, "write scratch files") from error
