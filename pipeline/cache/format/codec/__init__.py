"""Rows of floats to fixed-size bytes and back, one file for each encoding."""

from pipeline.cache.format.codec.encoding import RowIdentity
from pipeline.cache.format.codec.head import LinearHead
from pipeline.cache.format.codec.rows import (
    check_encodings,
    check_temperature,
    column_name,
    column_of,
    config_key,
    decode,
    default_temperature,
    depends_on_temperature,
    encode,
    has_maps,
    is_fixed,
    is_sampled,
    raw_rows,
    row_bytes,
    stored_outputs,
    with_column,
)
from pipeline.cache.format.codec.sampled import sampled_temperature

__all__ = [
    "LinearHead",
    "RowIdentity",
    "check_encodings",
    "check_temperature",
    "column_name",
    "column_of",
    "config_key",
    "decode",
    "default_temperature",
    "depends_on_temperature",
    "encode",
    "has_maps",
    "is_fixed",
    "is_sampled",
    "raw_rows",
    "row_bytes",
    "sampled_temperature",
    "stored_outputs",
    "with_column",
]
