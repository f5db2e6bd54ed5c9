"""Write one part: view-major Parquet, from rows that arrive group by group.

A group has the rows of all views, while the file has one view after the other. Each view therefore spills to an Arrow
stream on local scratch, and ``close`` assembles the part from these streams, in the memory of one row group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.errors import StorageError
from schemas.cache_format import PIXELS, ByteRange, ViewRange

_ROW_GROUP_BYTES = 32 << 20
_MIN_GROUP_ROWS = 256
_PAGE_BYTES = 1 << 20
_PIXEL_PAGE_BYTES = _PAGE_BYTES // 2
_ZSTD_LEVEL = 3


class PartWriter:
    """Writes rows to one checked local Parquet file. A context manager: its exit removes the spilled rows.

    Args:
        row_size_bytes: of the outputs of a row.
        has_maps: whether row groups and pages stay within their bytes however large a row is. Without maps a row group
            has 256 rows or more.
    """

    def __init__(
        self, scratch: Path, views: Sequence[int], schema: pa.Schema, *, row_size_bytes: int, has_maps: bool = False
    ) -> None:
        self._scratch = scratch
        self._schema = schema
        self._rows_per_group = max(1 if has_maps else _MIN_GROUP_ROWS, _ROW_GROUP_BYTES // max(1, row_size_bytes))
        self._rows_per_page = max(1, _PAGE_BYTES // max(1, row_size_bytes)) if has_maps else None
        self._spills = {view: _Spill(scratch / f"view-{view:05d}.arrows", schema) for view in views}

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for spill in self._spills.values():
            spill.remove()

    def add(self, view: int, batch: pa.RecordBatch) -> None:
        """Appends rows to one view."""
        self._spills[view].write(batch)

    def close(self) -> Path:
        """Assembles the part, opens it again and counts its rows.

        Raises:
            StorageError: the file does not have the rows that were added.
        """
        path = self._scratch / "part.parquet"
        max_pixel_bytes = max(spill.max_pixel_bytes for spill in self._spills.values())
        settings = parquet_settings(self._schema, max_pixel_bytes=max_pixel_bytes, rows_per_page=self._rows_per_page)
        with pq.ParquetWriter(path, self._schema, **settings) as writer:
            for spill in self._spills.values():
                rows_per_group = spill.rows_in(_ROW_GROUP_BYTES) if max_pixel_bytes else self._rows_per_group
                for table in spill.tables(rows_per_group):
                    writer.write_table(table, row_group_size=rows_per_group)
                    del table  # frees it before the next table is read
        self._check(path)
        return path

    def _check(self, path: Path) -> None:
        expected = sum(spill.num_rows for spill in self._spills.values())
        got = pq.ParquetFile(path).metadata.num_rows
        if got != expected:
            raise StorageError(
                "a part was not written completely",
                code="storage.incomplete-write",
                where=str(path),
                got=f"{got} rows",
                expected=f"{expected} rows",
                next_step="check the local disk, and run the build again",
            )


def parquet_settings(
    schema: pa.Schema, *, max_pixel_bytes: int = 0, rows_per_page: int | None = None
) -> dict[str, Any]:
    """The Parquet settings with the smallest files among those that take microseconds a row.

    Numbers that do not repeat gain nothing from dictionaries. The high bytes of small integers and floats are similar
    and compress well next to each other. Statistics of packed rows would be meaningless, and as long as rows.

    Args:
        max_pixel_bytes: of the largest stored view; 0: there are none.
        rows_per_page: None: as many as the writer needs to find that a page is full, 1,024.
    """
    packed = (pa.types.is_fixed_size_binary, pa.types.is_large_binary)
    numbers = [field for field in schema if not any(is_packed(field.type) for is_packed in packed)]
    split = {field.name: "BYTE_STREAM_SPLIT" for field in numbers if field.type in (pa.int32(), pa.float32())}
    settings: dict[str, Any] = {
        "compression": "zstd",
        "compression_level": _ZSTD_LEVEL,
        "use_dictionary": False,
        "column_encoding": {**split, "row": "DELTA_BINARY_PACKED"},
        "write_statistics": [field.name for field in numbers],
        "data_page_size": _PAGE_BYTES,
        **({} if rows_per_page is None else {"write_batch_size": rows_per_page}),
    }
    if not max_pixel_bytes:
        return settings
    others = [name for name in schema.names if name != PIXELS]
    return {
        **settings,
        # JPEG and photographs do not compress.
        "compression": {PIXELS: "none", **dict.fromkeys(others, "zstd")},
        "compression_level": dict.fromkeys(others, _ZSTD_LEVEL),
        "column_encoding": {**settings["column_encoding"], PIXELS: "PLAIN"},
        # The writer compares a page with its limit once in so many rows, 1,024 by default.
        "data_page_size": _PIXEL_PAGE_BYTES,
        "write_batch_size": max(1, _PIXEL_PAGE_BYTES // max_pixel_bytes),
    }


class _Spill:
    """Rows of one view, on local disk."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.num_rows = self.size_bytes = self.max_pixel_bytes = 0
        self._schema = schema
        self._sink = pa.OSFile(str(path), "wb")
        self._stream = pa.ipc.new_stream(self._sink, schema)

    def write(self, batch: pa.RecordBatch) -> None:
        self._stream.write_batch(batch)
        self.num_rows += batch.num_rows
        self.size_bytes += batch.nbytes
        if PIXELS in batch.schema.names:
            sizes = pc.call_function("binary_length", [batch[PIXELS]]).to_pylist()
            self.max_pixel_bytes = max([self.max_pixel_bytes, *sizes])

    def rows_in(self, size_bytes: int) -> int:
        """How many rows of mean size take so many bytes; at least 1."""
        return max(1, size_bytes * self.num_rows // max(1, self.size_bytes))

    def tables(self, max_rows: int) -> Iterator[pa.Table]:
        """The rows in order, as tables of at most ``max_rows`` rows unless a single batch has more."""
        self._finish()
        # Not memory-mapped: mapped pages of a large view would stay in memory until the last one is read.
        with pa.OSFile(str(self.path), "rb") as source:
            pending: list[pa.RecordBatch] = []
            for batch in pa.ipc.open_stream(source):
                if pending and sum(item.num_rows for item in pending) + batch.num_rows > max_rows:
                    yield pa.Table.from_batches(pending, self._schema)
                    pending = []
                pending.append(batch)
            if pending:
                yield pa.Table.from_batches(pending, self._schema)

    def _finish(self) -> None:
        if not self._sink.closed:
            self._stream.close()
            self._sink.close()

    def remove(self) -> None:
        self._finish()
        self.path.unlink(missing_ok=True)


def view_ranges(path: Path, counts: Mapping[int, int]) -> tuple[tuple[ViewRange, ...], ByteRange]:
    """The byte range of each view in a part, and that of the footer.

    ``counts`` has the rows of each view, in the order in which they were written. No row group spans two views.
    """
    metadata = pq.read_metadata(path)
    ranges: list[ViewRange] = []
    group, end = 0, len(b"PAR1")
    with path.open("rb") as file:
        for view, rows in counts.items():
            start, num_rows = end, 0
            while num_rows < rows:
                num_rows += metadata.row_group(group).num_rows
                end = _end_of(metadata.row_group(group))
                group += 1
            assert num_rows == rows, "no row group spans two views"
            digest = _range_digest(file, start, end - start)
            ranges.append(ViewRange(view=view, offset=start, size_bytes=end - start, rows=rows, digest=digest))
        size_bytes = path.stat().st_size - end
        footer = ByteRange(offset=end, size_bytes=size_bytes, digest=_range_digest(file, end, size_bytes))
    return tuple(ranges), footer


def _range_digest(file: IO[bytes], offset: int, size_bytes: int) -> str:
    """SHA-256 of a range, read in pages: a view may be larger than the memory."""
    hasher = hashlib.sha256()
    file.seek(offset)
    while size_bytes:
        chunk = file.read(min(_PAGE_BYTES, size_bytes))
        hasher.update(chunk)
        size_bytes -= len(chunk)
    return hasher.hexdigest()


def _end_of(row_group: pq.RowGroupMetaData) -> int:
    ends: list[int] = []
    for number in range(row_group.num_columns):
        column = row_group.column(number)
        start = column.data_page_offset
        if column.has_dictionary_page:
            start = min(start, column.dictionary_page_offset)
        ends.append(start + column.total_compressed_size)
    return max(ends)
