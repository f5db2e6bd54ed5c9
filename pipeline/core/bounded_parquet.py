"""Reads untrusted Parquet within a memory limit that follows from the file's size.

A few bytes of Parquet can expand to gigabytes: run-length encoded numbers, one long string repeated, pages of zeros.
The size of numbers is known from the footer, and the size of texts after each distinct text is read, both before the
expansion.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

MAX_EXPANSION = 100
"""A table may take this many times its bytes in the file in memory, or ``ALWAYS_ALLOWED_BYTES`` if that is more."""
ALWAYS_ALLOWED_BYTES = 512 * 2**20
_WIDTH_BYTES = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
_OFFSET_BYTES = 8


def read_bounded(
    source: Any,
    *,
    size_bytes: int,
    metadata: pq.FileMetaData | None = None,
    row_groups: Sequence[int] | None = None,
    repeated: Collection[str] = (),
    distinct: Collection[str] = (),
    left_out: Collection[str] = (),
    **options: Any,
) -> pa.Table:
    """Reads row groups of a file, in the calling thread.

    Args:
        source: passed to ``pyarrow.parquet.ParquetFile``, as are ``options``.
        size_bytes: bytes of the file that are read.
        row_groups: their numbers; None: all.
        repeated: columns that stay dictionaries, which store each distinct text once.
        distinct: columns of long values that do not repeat, for which no dictionary is built.
        left_out: columns that are not read.

    Raises:
        ArrowInvalid: the table would exceed the memory limit, or the file is no Parquet.
    """
    limit = max(ALWAYS_ALLOWED_BYTES, MAX_EXPANSION * size_bytes)
    footer = pq.read_metadata(source) if metadata is None else metadata
    groups = range(footer.num_row_groups) if row_groups is None else row_groups
    apart = {*distinct, *left_out}
    texts = [name for name in _text_columns(footer.schema) if name not in apart]
    _check(sum(_declared_bytes(footer, group) for group in groups), limit, size_bytes)
    file = pq.ParquetFile(source, metadata=footer, pre_buffer=False, read_dictionary=texts, **options)
    columns = [name for name in footer.schema.names if name not in apart] if apart else None
    table = file.read_row_groups([*groups], columns, use_threads=False)
    dense = [name for name in texts if name not in repeated]
    _check(sum(_dense_bytes(table[name]) for name in dense), limit, size_bytes)
    schema = footer.schema.to_arrow_schema()
    for name in dense:
        field = schema.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, table[name].cast(field.type))
    for name in distinct:
        table = table.append_column(schema.field(name), _read_distinct(file, groups, name, limit, size_bytes))
    return table


def _read_distinct(
    file: pq.ParquetFile, groups: Sequence[int], name: str, limit: int, size_bytes: int
) -> pa.ChunkedArray:
    """No value can be longer than its row group, so a batch of these rows stays within the limit, and is checked before
    the next is read."""
    chunks: list[pa.Array] = []
    needed_bytes = 0
    for batch in file.iter_batches(MAX_EXPANSION, row_groups=[*groups], columns=[name], use_threads=False):
        needed_bytes += batch.nbytes
        _check(needed_bytes, limit, size_bytes)
        chunks.append(batch.column(0))
    return pa.chunked_array(chunks, file.schema_arrow.field(name).type)


def _text_columns(schema: pq.ParquetSchema) -> list[str]:
    """Names of the columns of variable-length values.

    Raises:
        ArrowInvalid: such a column is nested in a list.
    """
    columns = [schema.column(number) for number in range(len(schema))]
    texts = [column for column in columns if column.physical_type == "BYTE_ARRAY"]
    if nested := [column.path for column in texts if column.path != column.name]:
        raise pa.ArrowInvalid(f"lists of strings in {', '.join(nested)}")
    return [column.name for column in texts]


def _declared_bytes(metadata: pq.FileMetaData, row_group: int) -> int:
    """Memory of a row group according to the footer, with each distinct text once."""
    group, total = metadata.row_group(row_group), 0
    for number in range(group.num_columns):
        chunk, column = group.column(number), metadata.schema.column(number)
        num_values = max(group.num_rows, chunk.num_values)
        if chunk.physical_type == "BYTE_ARRAY":
            total += chunk.total_uncompressed_size + _OFFSET_BYTES * num_values
        else:
            width = (
                column.length if chunk.physical_type == "FIXED_LEN_BYTE_ARRAY" else _WIDTH_BYTES[chunk.physical_type]
            )
            total += num_values * width
    return total


def _dense_bytes(column: pa.ChunkedArray) -> int:
    """Memory of a dictionary column after every row gets a copy of its text."""
    total = 0
    for chunk in column.chunks:
        lengths = pc.call_function("binary_length", [chunk.dictionary]).cast(pa.int64())
        total += (lengths.take(chunk.indices).sum().as_py() or 0) + _OFFSET_BYTES * len(chunk)
    return total


def _check(needed_bytes: int, limit: int, size_bytes: int) -> None:
    if needed_bytes > limit:
        raise pa.ArrowInvalid(
            f"{size_bytes} bytes that expand to {needed_bytes}; the limit is {MAX_EXPANSION} times as many, "
            f"or {ALWAYS_ALLOWED_BYTES} if that is more"
        )
