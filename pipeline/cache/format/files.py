"""Files of a cache, verified when they are read: records by their own digest, tables by the digest in the manifest."""

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
from schemas.cache_format import FORMAT_VERSION, FileRef, VersionedRecord

R = TypeVar("R", bound=VersionedRecord)

REBUILD = "remove this file and run: stillroom cache build CONFIG"
"""The remedy for any damage: a build revokes the commits that name missing files, and builds these files again."""


def parse_record(kind: type[R], data: bytes, *, where: str) -> R:
    """
    Raises:
        CacheError: the record was changed after it was written, or has another format version.
    """
    body = unseal(data, where=where)
    body.pop("digest")
    if body.get("format_version") != FORMAT_VERSION:
        raise CacheError(
            "unknown cache format",
            code="cache.unknown-format",
            where=where,
            got=body.get("format_version"),
            expected=FORMAT_VERSION,
            next_step="read it with the version that wrote it",
        )
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CacheError(
            f"this is not a {kind.__name__.lower()} of cache format {FORMAT_VERSION}",
            code="cache.invalid-record",
            where=where,
            got=f"{key}: {first['msg']}" if key else first["msg"],
            next_step="read it with the version that wrote it",
        ) from error


def read_file(cache_url: str, path: str, *, max_bytes: int = storage.MAX_TABLE_BYTES) -> bytes:
    """
    Raises:
        CacheError: the file is missing, or not readable.
        TooLargeError: it is larger than ``max_bytes``.
    """
    url = storage.join(cache_url, path)
    try:
        return storage.read(url, max_bytes=max_bytes)
    except TooLargeError:
        raise
    except StorageInputError as error:
        raise missing_file(url, error) from error


def missing_file(url: str, error: StorageInputError) -> CacheError:
    """The error for a file that a record names and storage does not have."""
    return CacheError(
        "a file of this cache is missing",
        code="cache.missing-file",
        where=redact(url),
        got=error.what,
        next_step="restore it, or run: stillroom cache build CONFIG",
    )


def check_sha256(data: bytes, sha256: str, *, where: str, next_step: str = REBUILD) -> None:
    """
    Raises:
        CacheError: the bytes are not those with this SHA-256.
    """
    if (got := digest(data)) != sha256:
        raise changed_file(where, got=f"sha256 {got[:16]}", expected=sha256[:16], next_step=next_step)


def changed_file(
    where: str | None, *, got: str | None = None, expected: str | None = None, next_step: str = REBUILD
) -> CacheError:
    """The error for bytes that are not those that a record names."""
    return CacheError(
        "this file was changed after it was written",
        code="cache.changed-file",
        where=where,
        got=got,
        expected=expected,
        next_step=next_step,
    )


def empty_cells(name: str, column: pa.Array | pa.ChunkedArray) -> CacheError:
    """The error for a column that must not have nulls and does."""
    return CacheError(
        f"column {name} has empty cells",
        code="cache.empty-cells",
        got=f"{column.null_count} of {len(column)}",
        next_step=REBUILD,
    )


def publish_named(cache_url: str, path: str, data: bytes) -> FileRef:
    """Publishes a file under a fixed name. The file that it replaces is stored again, named by its digest.

    A run always uses its copy of the manifest, and that copy names the former content.
    """
    ref = FileRef(path=path, sha256=digest(data), size_bytes=len(data))
    url = storage.join(cache_url, path)
    former = storage.read_if_exists(url, max_bytes=storage.MAX_TABLE_BYTES)
    if former is not None and (sha256 := digest(former)) != ref.sha256:
        storage.write(storage.join(cache_url, layout.former_path(sha256)), former)
    storage.write(url, data)
    return ref


def read_named(cache_url: str, ref: FileRef) -> bytes:
    """A file by name and content, even if an extension of the cache has replaced it since.

    Raises:
        CacheError: no file has this content.
    """
    url = storage.join(cache_url, ref.path)
    data = read_file(cache_url, ref.path)
    if (got := digest(data)) == ref.sha256:
        return data
    former_url = storage.join(cache_url, layout.former_path(ref.sha256))
    former = storage.read_if_exists(former_url, max_bytes=storage.MAX_TABLE_BYTES)
    if former is not None and digest(former) == ref.sha256:
        return former
    raise changed_file(redact(url), got=f"sha256 {got[:16]}", expected=ref.sha256[:16])


def read_parquet(data: bytes, *, where: str | None = None, repeated: Sequence[str] = ()) -> pa.Table:
    """A small table. Not read by ``pq.read_table``: its threads abort a process that exits right after the call.

    Columns named in ``repeated`` are returned as dictionaries, which hold each distinct text once.

    Raises:
        CacheError: the data is not Parquet, or would take far more memory than its size.
    """
    try:
        return read_bounded(pa.BufferReader(data), size_bytes=len(data), repeated=repeated)
    except (pa.ArrowException, OSError) as error:
        raise CacheError(
            "this file is not readable Parquet",
            code="cache.unreadable-parquet",
            where=where,
            got=first_line(error),
            next_step=REBUILD,
        ) from error
