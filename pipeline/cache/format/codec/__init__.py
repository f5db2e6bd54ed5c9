"""Rows of floats to fixed-size bytes and back, one file for each encoding."""

from pipeline.cache.format.codec.rows import (
    check_encodings,
    column_of,
    decode,
    depends_on_temperature,
    encode,
    outputs_of,
    raw_rows,
    row_bytes,
)

__all__ = [
    "check_encodings",
    "column_of",
    "decode",
    "depends_on_temperature",
    "encode",
    "outputs_of",
    "raw_rows",
    "row_bytes",
]
