"""Files of a cache, checked as they are read: records by the digest they carry, tables by the one that names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import pyarrow as pa
from pydantic import ValidationError

from pipeline import storage
from pipeline.cache.format import layout
from pipeline.core.bounded_parquet import read_bounded
from pipeline.core.errors import CacheError, StorageInputError, TooLargeError, first_line
from pipeline.core.hashing import digest, unseal
from pipeline.core.redaction import redact
from schemas.cache_format import FORMAT_VERSION, FileRef, Record

R = TypeVar("R", bound=Record)

REBUILD = "remove this file and run: stillroom cache build CONFIG"
"""The way out of any damage: a build makes what is missing, and takes back the commits that name it."""


def parse_record(kind: type[R], data: bytes, *, where: str) -> R:
    """
    Raises:
        CacheError: changed after it was written, or of another format version.
    """
    body = unseal(data, where=where)
    body.pop("digest")
    if body.get("format_version") != FORMAT_VERSION:
        raise CacheError("unknown cache format", where=where, got=body.get("format_version"), expected=FORMAT_VERSION)
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CacheError(
            f"this is no {kind.__name__.lower()} of cache format {FORMAT_VERSION}",
            where=where,
            got=f"{key}: {first['msg']}" if key else first["msg"],
            next_step="read it with the version that wrote it",
        ) from error


def read_file(cache_url: str, path: str, *, max_bytes: int = storage.MAX_TABLE_BYTES) -> bytes:
    """
    Raises:
        CacheError: the file is not there, or may not be read.
        TooLargeError: it is larger than ``max_bytes``.
    """
    url = storage.join(cache_url, path)
    try:
        return storage.read(url, max_bytes=max_bytes)
    except TooLargeError:
        raise
    except StorageInputError as error:
        raise gone(url, error) from error


def gone(url: str, error: StorageInputError) -> CacheError:
    """What to raise for a file that the cache names and storage does not give."""
    return CacheError(
        "a file of this cache is missing",
        where=redact(url),
        got=error.what,
        next_step="restore it, or run: stillroom cache build CONFIG",
    )


def publish_named(cache_url: str, path: str, data: bytes) -> FileRef:
    """Publishes a file whose name stays and whose content may change; what it replaces is kept under its digest.

    A run uses its own copy of the manifest for life, and that copy names the former content.
    """
    ref = FileRef(path=path, sha256=digest(data), size_bytes=len(data))
    url = storage.join(cache_url, path)
    former = storage.read_if_there(url, max_bytes=storage.MAX_TABLE_BYTES)
    if former is not None and (sha256 := digest(former)) != ref.sha256:
        storage.write(storage.join(cache_url, layout.former_path(sha256)), former)
    storage.write(url, data)
    return ref


def read_named(cache_url: str, ref: FileRef) -> bytes:
    """A file by name and content, also where an extension of the cache has replaced it since.

    Raises:
        CacheError: no file has the content.
    """
    url = storage.join(cache_url, ref.path)
    data = read_file(cache_url, ref.path)
    if (got := digest(data)) == ref.sha256:
        return data
    former_url = storage.join(cache_url, layout.former_path(ref.sha256))
    former = storage.read_if_there(former_url, max_bytes=storage.MAX_TABLE_BYTES)
    if former is not None and digest(former) == ref.sha256:
        return former
    raise CacheError(
        "this file was changed after it was written",
        where=redact(url),
        got=f"sha256 {got[:16]}",
        expected=ref.sha256[:16],
        next_step=REBUILD,
    )


def read_parquet(data: bytes, *, where: str | None = None, repeated: Sequence[str] = ()) -> pa.Table:
    """A small table. Not by ``read_table``: what that leaves running aborts a process that ends right after it.

    Columns named in ``repeated`` come as dictionaries, which keep each of their texts once.

    Raises:
        CacheError: this is no Parquet, or would take far more memory than its size.
    """
    try:
        return read_bounded(pa.BufferReader(data), size_bytes=len(data), repeated=repeated)
    except (pa.ArrowException, OSError) as error:
        got = first_line(error)
        raise CacheError("this file is not readable Parquet", where=where, got=got, next_step=REBUILD) from error
