"""One view of one shard, read from its part: the range of its row groups and the footer, each checked by a digest."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.cache.format.files import REBUILD, changed_file, missing_file
from pipeline.core.bounded_parquet import read_bounded
from pipeline.core.errors import CacheError, StorageError, StorageInputError
from pipeline.core.redaction import redact
from schemas.cache_format import PIXELS

_READ_BYTES = 64 << 20
"""A view with stored pixels may not fit into memory."""


class CommittedView(NamedTuple):
    """The row of one view of one shard in the manifest's table of parts: its bytes and those of the part's footer."""

    shard_id: str
    view: int
    path: str
    part_sha256: str
    part_size_bytes: int
    offset: int
    size_bytes: int
    footer_offset: int
    footer_digest: str
    rows: int
    digest: str


def read_view(cache_url: str, view: CommittedView, *, has_pixels: bool, reads_pixels: bool) -> Iterator[pa.Table]:
    """The rows of a view, in several tables if it is large. The digest covers the whole view, so it is known at the end
    of the iterator whether the tables are right.

    Args:
        has_pixels: whether the part has the column of stored views; ``reads_pixels`` whether the tables have it.

    Raises:
        CacheError: the bytes are missing or were changed.
    """
    url, end = storage.join(cache_url, view.path), view.offset + view.size_bytes
    where = f"view {view.view} of {redact(url)}"
    file_size, footer = view.part_size_bytes, view.footer_offset
    tail = _read_range(url, footer, file_size - footer, end=file_size)
    _check_range(hashlib.sha256(tail), view.footer_digest, where=f"footer of {where}")
    apart = [PIXELS] if has_pixels else []
    whole, num_rows = hashlib.sha256(), 0
    try:
        # With its metadata given, Parquet does not read the last 64 KiB of the file to find the footer.
        metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + tail))
        for start, stop, groups in _reads(metadata, view.offset, end):
            data = _read_range(url, start, stop - start, end=file_size)
            whole.update(data)
            if stop == end:
                _check_range(whole, view.digest, where=where)
            table = read_bounded(
                pa.PythonFile(_Range(file_size, start, data), mode="r"),
                size_bytes=len(data),
                metadata=metadata,
                row_groups=groups,
                **{"distinct" if reads_pixels else "left_out": apart},
            )
            num_rows += table.num_rows
            yield table
    except (pa.ArrowInvalid, OSError) as error:
        raise CacheError(
            "this part is damaged", code="cache.damaged-part", where=where, got=str(error), next_step=REBUILD
        ) from error
    if num_rows != view.rows:
        raise CacheError(
            "the number of rows of a view of this part differs from its commit",
            code="cache.damaged-part",
            where=where,
            got=num_rows,
            expected=view.rows,
            next_step=REBUILD,
        )


def _read_range(url: str, offset: int, size_bytes: int, *, end: int) -> bytes:
    try:
        return storage.read_range(url, offset, size_bytes)
    except StorageInputError as error:
        raise missing_file(url, error) from error
    except StorageError as error:
        _check_size(url, end, error)
        raise


def _check_range(hasher: Any, digest: str, *, where: str) -> None:
    if hasher.hexdigest() != digest:
        raise changed_file(where)


def _check_size(url: str, expected: int, cause: StorageError) -> None:
    """Raises for a truncated part, which no retry repairs, so that the caller can raise the error of storage."""
    if (got := storage.size(url)) != expected:
        raise CacheError(
            "the size of this part differs from that in its commit",
            code="cache.truncated-part",
            where=redact(url),
            got=f"{got} bytes",
            expected=f"{expected} bytes",
            next_step=REBUILD,
        ) from cause


class _Range(io.RawIOBase):
    """A file of which one range was fetched. Reading outside of the range raises OSError."""

    def __init__(self, size_bytes: int, offset: int, data: bytes) -> None:
        self._size, self._offset, self._data, self._position = size_bytes, offset, data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        start, stop = self._position, self._size if size < 0 else min(self._size, self._position + size)
        if start < self._offset or stop > self._offset + len(self._data):
            raise OSError(f"bytes {start}..{stop} were not fetched")
        self._position = stop
        return self._data[start - self._offset : stop - self._offset]


def _reads(metadata: pq.FileMetaData, start: int, stop: int) -> Iterator[tuple[int, int, list[int]]]:
    """The range of a view as ranges of at least ``_READ_BYTES``, except for the last, with their row groups.

    Raises:
        ArrowInvalid: the row groups do not fill the range in their order.
    """
    first_bytes = [metadata.row_group(number).column(0).data_page_offset for number in range(metadata.num_row_groups)]
    numbers = [number for number, first in enumerate(first_bytes) if start <= first < stop]
    ends = [*(first_bytes[number] for number in numbers[1:]), stop]
    if any(end < first_bytes[number] for number, end in zip(numbers, ends, strict=False)):
        raise pa.ArrowInvalid("row groups are out of order")
    groups: list[int] = []
    for number, end in zip(numbers, ends, strict=False):
        groups.append(number)
        if end - start >= _READ_BYTES and end < stop:
            yield start, end, groups
            start, groups = end, []
    yield start, stop, groups
