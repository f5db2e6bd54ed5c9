"""Whole objects and ranges of them by URL: read, listed, published, deleted, fetched to local files."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline.core.errors import StorageError, TooLargeError, TransientStorageError
from pipeline.core.redaction import redact
from pipeline.storage.failures import repeated, root_error, translated_errors
from pipeline.storage.filesystems import filesystem_of, writable_filesystem
from pipeline.storage.local import crc32, put_file, scratch_folder, temporary_sibling, walk
from pipeline.storage.urls import WRITABLE, protocol, short_name

NAMES_A_PAGE = 1000
"""A store tells so many names with their sizes in one answer."""
# Of files that are read whole, whoever wrote them. A header of 100,000 classes has 8 MB; the table of parts of 100,000
# shards with 100 views, and class means of 100,000 classes with 4,096 numbers, about 1 GB.
MAX_RECORD_BYTES = 32 * 2**20
MAX_TABLE_BYTES = 4 * 2**30
# One request up to twice this size, else parts of it, a few at a time: bounds the memory of an upload.
_S3_CHUNK_BYTES, _S3_CONCURRENCY = 32 * 2**20, 4
# A CRC of the whole object, which the store computes from what arrived and refuses if it differs. Of the algorithms
# that botocore has without a native extension, S3 folds only this one over the parts of a multipart upload.
S3_CHECKSUM = {"ChecksumAlgorithm": "CRC32", "ChecksumType": "FULL_OBJECT"}
# What is larger is fetched in pieces of this size, several at a time, after one request that tells how large it is.
_S3_FETCH_BYTES = 50 * 2**20


@repeated
def exists(url: str) -> bool:
    """Whether a file is there now; a store that cannot tell is an error, never an absent file."""
    filesystem, path = filesystem_of(url)
    with translated_errors(url, "look for"):
        found = _info(filesystem, path)
        return found is not None and found["type"] == "file"


def _info(filesystem: Any, path: str) -> dict[str, Any] | None:
    """What the store says of a path now, past any cached listing, or None where nothing is."""
    # fsspec's own exists and isfile answer False to every exception, also to a refused or throttled request.
    filesystem.invalidate_cache(path.rstrip("/").rpartition("/")[0])
    try:
        return dict(filesystem.info(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        if root_error(error) is not error:
            raise
        return None


@repeated
def stamp(url: str) -> str:
    """What the store says of a file now, tag and times included: another text once the file was replaced."""
    filesystem, path = filesystem_of(url)
    with translated_errors(url, "stat"):
        filesystem.invalidate_cache(path.rpartition("/")[0])
        return str(sorted(filesystem.info(path).items()))


@repeated
def size(url: str) -> int:
    """Size in bytes."""
    filesystem, path = filesystem_of(url)
    with translated_errors(url, "stat"):
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


@repeated
def read(url: str, *, max_bytes: int | None = None) -> bytes:
    """The whole object.

    Raises:
        TooLargeError: it is larger than ``max_bytes``.
    """
    filesystem, path = filesystem_of(url)
    with translated_errors(url, "read"):
        try:
            return read_whole(filesystem, path, url, max_bytes)
        except FileNotFoundError:
            # An object store has no folders, and calls a prefix missing.
            if filesystem.isdir(path):
                raise IsADirectoryError(path) from None
            raise


@repeated
def read_if_there(url: str, *, max_bytes: int | None = None) -> bytes | None:
    """The whole object, or None where there is none: one request, where ``exists`` and ``read`` are two or three.

    Raises:
        TooLargeError: it is larger than ``max_bytes``.
    """
    filesystem, path = filesystem_of(url)
    with translated_errors(url, "read"):
        try:
            return read_whole(filesystem, path, url, max_bytes)
        except (FileNotFoundError, NotADirectoryError) as error:
            if root_error(error) is not error:
                raise
            return None


def read_whole(filesystem: Any, path: str, url: str, max_bytes: int | None) -> bytes:
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
            expected=f"at most {max_bytes} bytes",
        )


@repeated
def read_range(url: str, offset: int, size_bytes: int) -> bytes:
    """Exactly ``size_bytes`` from ``offset``; a shorter object is an error, never a short answer."""
    filesystem, path = filesystem_of(url)
    with translated_errors(url, "read"):
        data = bytes(filesystem.cat_file(path, start=offset, end=offset + size_bytes))
        is_short = len(data) != size_bytes
        is_cut = is_short and _file_size(filesystem, path) >= offset + size_bytes
    if is_cut:
        raise TransientStorageError(
            "the answer was cut short", where=redact(url), got=f"{len(data)} of {size_bytes} bytes"
        )
    if is_short:
        raise StorageError(
            "the object is shorter than its commit says",
            where=redact(url),
            got=f"{len(data)} bytes from {offset}",
            expected=f"{size_bytes} bytes",
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


@repeated
def entries(url: str) -> list[Entry]:
    """Every object below ``url`` by path, leftovers of killed writers included; empty where the folder is absent."""
    filesystem, path = filesystem_of(url)
    with translated_errors(url, "list"):
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
        with translated_errors(url, "list"):
            folder = Path(filesystem_of(url)[1])
            found = walk(folder, None if links_out else folder.resolve(), ())
            return dict(sorted((str(path.relative_to(folder)), path.stat().st_size) for path in found))
    return {entry.path: entry.size_bytes for entry in entries(url)}


def is_listed(url: str, num_names: int) -> bool:
    """Whether ``sizes_right_below`` asks less than a look at each of so many objects: a disk answers at once."""
    return num_names >= NAMES_A_PAGE and protocol(url) in WRITABLE and protocol(url) != "file"


@repeated
def sizes_right_below(url: str) -> dict[str, int]:
    """Bytes of every object right below ``url`` by its name; empty where the folder is absent."""
    filesystem, path = filesystem_of(url)
    with translated_errors(url, "list"):
        filesystem.invalidate_cache(path)
        try:
            found = filesystem.ls(path, detail=True)
        except FileNotFoundError as error:
            if root_error(error) is not error:
                raise
            return {}
        finally:
            # What fsspec keeps of a listing would answer for sizes that are asked later, when they may have changed.
            filesystem.invalidate_cache(path)
    return {info["name"].rsplit("/", 1)[-1]: int(info["size"]) for info in found if info["type"] == "file"}


def folders(url: str) -> list[str]:
    """Names of the folders right below ``url``, sorted; empty ones too on a file system, which has such."""
    filesystem, path = filesystem_of(url)
    with translated_errors(url, "list"):
        if protocol(url) == "file":
            return sorted(item.name for item in Path(path).iterdir() if item.is_dir())
        filesystem.invalidate_cache(path)
        found = filesystem.ls(path, detail=True)
    return sorted(info["name"].rstrip("/").rsplit("/", 1)[-1] for info in found if info["type"] == "directory")


@repeated
def put(local: Path, url: str) -> None:
    """Publishes a closed local file under ``url``: one replace on a file system, one upload on an object store."""
    filesystem, path = writable_filesystem(url)
    name = protocol(url)
    with translated_errors(url, "write"):
        if name == "file":
            put_file(local, Path(path))
        elif name == "s3":
            _put_s3(filesystem, local, path, where=redact(url))
        else:
            filesystem.put_file(str(local), path)


def _put_s3(filesystem: Any, local: Path, path: str, *, where: str) -> None:
    """Uploads with a checksum, and asks what arrived: not every store heeds the checksum."""
    filesystem.put_file(str(local), path, chunksize=_S3_CHUNK_BYTES, max_concurrency=_S3_CONCURRENCY, **S3_CHECKSUM)
    bucket, key, _ = filesystem.split_path(path)
    stored = filesystem.call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    expected = {"size": local.stat().st_size, "crc32": crc32(local)}
    # A store without checksums has none to tell.
    got = {"size": stored["ContentLength"], "crc32": stored.get("ChecksumCRC32", expected["crc32"])}
    if got != expected:
        raise TransientStorageError(
            "the store holds other bytes than were sent", where=where, got=got, expected=expected
        )


def num_puts(size_bytes: float) -> int:
    """Requests in which S3 is sent an object: itself, or its beginning, its pieces and its end."""
    return 1 if size_bytes < 2 * _S3_CHUNK_BYTES else 2 + math.ceil(size_bytes / _S3_CHUNK_BYTES)


def num_gets(size_bytes: float) -> int:
    """Requests in which S3 is asked for a copy of an object, after its size."""
    return 1 if size_bytes <= _S3_FETCH_BYTES else 1 + math.ceil(size_bytes / _S3_FETCH_BYTES)


def write(url: str, data: bytes) -> None:
    """Publishes bytes under ``url``, replacing what was there."""
    with scratch_folder() as folder:
        local = folder / "object"
        local.write_bytes(data)
        put(local, url)


@repeated
def delete(url: str) -> None:
    """Removes one object; an absent one is fine, since another builder may have been first."""
    filesystem, path = writable_filesystem(url)
    with contextlib.suppress(FileNotFoundError), translated_errors(url, "delete"):
        try:
            filesystem.rm_file(path)
        except FileNotFoundError:
            return


@repeated
def local_copy(url: str, folder: Path) -> Path:
    """A local path with the object's bytes: itself if it is local, else a copy in ``folder``, fetched once a node.

    Safe among processes: one downloads under a lock, the others wait and find it.
    """
    filesystem, path = filesystem_of(url)
    with translated_errors(url, "read"):
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
    scratch = temporary_sibling(target)
    try:
        _fill(filesystem, path, scratch, url=url, size_bytes=size_bytes)
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


@repeated
def download(url: str, target: Path, size_bytes: int) -> None:
    """Fills a local file with the object's bytes, in place; another length than the object's size is an error."""
    filesystem, path = filesystem_of(url)
    _fill(filesystem, path, target, url=url, size_bytes=size_bytes)


def _fill(filesystem: Any, path: str, target: Path, *, url: str, size_bytes: int) -> None:
    pieces = {"chunksize": _S3_FETCH_BYTES} if protocol(url) == "s3" else {}
    with translated_errors(url, "fetch"):
        filesystem.get_file(path, str(target), **pieces)
    if target.stat().st_size != size_bytes:
        raise TransientStorageError("the download was cut short", where=redact(url), expected=f"{size_bytes} bytes")
