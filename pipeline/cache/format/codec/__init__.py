"""Rows of floats to fixed-size bytes and back, one file for each encoding."""

from pipeline.cache.format.codec.rows import (
    check_encodings,
    column_of,
    config_key,
    decode,
    depends_on_temperature,
    encode,
    raw_rows,
    row_bytes,
    stored_outputs,
)

__all__ = [
    "check_encodings",
    "column_of",
    "config_key",
    "decode",
    "depends_on_temperature",
    "encode",
    "raw_rows",
    "row_bytes",
    "stored_outputs",
]
