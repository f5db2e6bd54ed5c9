"""Parquet that anybody may have written, read within a memory that its size allows.

A few bytes of Parquet can stand for gigabytes: runs of one number, one long text repeated, pages of zeros. How much it
will be is known before it is made: of numbers from the footer, of texts once each different one was read.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

MAX_EXPANSION = 100
"""Times its bytes in the file that a table may take in memory, where that is more than ``ALWAYS_ALLOWED_BYTES``."""
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
    **options: Any,
) -> pa.Table:
    """Row groups of a file, in this thread.

    Args:
        source: what ``pyarrow.parquet.ParquetFile`` takes, and ``options`` too.
        size_bytes: of what is read.
        row_groups: by number; None: all.
        repeated: columns that stay dictionaries, which keep each of their texts once.

    Raises:
        ArrowInvalid: it would take more memory than its size allows, or is no Parquet.
    """
    limit = max(ALWAYS_ALLOWED_BYTES, MAX_EXPANSION * size_bytes)
    about = pq.read_metadata(source) if metadata is None else metadata
    groups = range(about.num_row_groups) if row_groups is None else row_groups
    texts = _texts(about.schema)
    _check(sum(_declared_bytes(about, group) for group in groups), limit, size_bytes)
    file = pq.ParquetFile(source, metadata=about, pre_buffer=False, read_dictionary=texts, **options)
    table = file.read_row_groups([*groups], use_threads=False)
    dense = [name for name in texts if name not in repeated]
    _check(sum(_dense_bytes(table[name]) for name in dense), limit, size_bytes)
    expected = about.schema.to_arrow_schema()
    for name in dense:
        field = expected.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, table[name].cast(field.type))
    return table


def _texts(schema: pq.ParquetSchema) -> list[str]:
    """Columns whose values have a length each.

    Raises:
        ArrowInvalid: some are in lists.
    """
    columns = [schema.column(number) for number in range(len(schema))]
    texts = [column for column in columns if column.physical_type == "BYTE_ARRAY"]
    if nested := [column.path for column in texts if column.path != column.name]:
        raise pa.ArrowInvalid(f"lists of texts in {', '.join(nested)}")
    return [column.name for column in texts]


def _declared_bytes(metadata: pq.FileMetaData, number: int) -> int:
    """What a row group takes in memory by the footer, each different text once."""
    group, total = metadata.row_group(number), 0
    for at in range(group.num_columns):
        chunk, column = group.column(at), metadata.schema.column(at)
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
    """What a column of dictionaries takes once every row has a text of its own."""
    total = 0
    for chunk in column.chunks:
        lengths = pc.call_function("binary_length", [chunk.dictionary]).cast(pa.int64())
        total += (lengths.take(chunk.indices).sum().as_py() or 0) + _OFFSET_BYTES * len(chunk)
    return total


def _check(needed_bytes: int, limit: int, size_bytes: int) -> None:
    if needed_bytes > limit:
        raise pa.ArrowInvalid(
            f"{size_bytes} bytes that stand for {needed_bytes}; at most {MAX_EXPANSION} times as many are read, "
            f"and {ALWAYS_ALLOWED_BYTES} always"
        )
