"""Rows of floats to fixed-size bytes and back. The header names the encoding; readers refuse one they do not know."""

from pipeline.cache.codec.outputs import outputs_of
from pipeline.cache.codec.rows import arrow_type, check_encodings, decode, depends_on_temperature, encode, row_bytes

__all__ = ["arrow_type", "check_encodings", "decode", "depends_on_temperature", "encode", "outputs_of", "row_bytes"]
