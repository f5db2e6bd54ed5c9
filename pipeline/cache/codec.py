"""Rows of floats to fixed-size bytes and back. The header names the encoding; readers refuse one they do not know."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import CacheError
from schemas.config import CacheConfig
from schemas.manifest import Output

_DTYPES: Mapping[str, np.dtype[np.floating]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
_CONFIG_DTYPES = {"fp32": "float32", "fp16": "float16"}


def outputs_of(config: CacheConfig, *, num_classes: int, embedding_dim: int) -> tuple[Output, ...]:
    """What a cache with this config keeps of each row."""
    wanted = (("logits", num_classes, config.logits), ("embedding", embedding_dim, config.embeddings))
    return tuple(
        Output.model_validate({"name": name, "shape": (width,), "dtype": _CONFIG_DTYPES[kind], "encoding": "dense"})
        for name, width, kind in wanted
        if kind != "none"
    )


def row_bytes(output: Output) -> int:
    """Bytes of one row as stored, before page compression."""
    return _DTYPES[output.dtype].itemsize * int(np.prod(output.shape))


def arrow_type(output: Output) -> pa.DataType:
    return pa.binary(row_bytes(output))


def encode(values_ND: NDArray[np.float32], output: Output) -> pa.Array:
    """[N,D] fp32 to N little-endian rows.

    Raises:
        CacheError: a value does not fit the stored type, which would silently become infinite.
    """
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(values_ND, dtype=_DTYPES[output.dtype])
    if not np.isfinite(stored).all():
        raise CacheError(
            f"the teacher's {output.name} do not fit {output.dtype}",
            got=f"largest magnitude {float(np.abs(values_ND).max()):.4g}",
            next_step=f"set cache.{'embeddings' if output.name == 'embedding' else output.name}=fp32",
        )
    return pa.Array.from_buffers(arrow_type(output), len(stored), [None, pa.py_buffer(stored.tobytes())])


def depends_on_temperature(output: Output) -> bool:
    """Whether what ``decode`` gives is a function of the temperature of the loss that reads it."""
    return output.encoding != "dense"


def decode(column: pa.Array | pa.ChunkedArray, output: Output, *, temperature: float = 1.0) -> NDArray[np.float32]:
    """N stored rows to [N,D] fp32, as a loss at this temperature sees them; the same at all where ``output`` is dense."""
    assert temperature > 0
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if column.null_count:
        raise CacheError(f"{column.null_count} rows have no {output.name}")
    width = row_bytes(output)
    raw = np.frombuffer(column.buffers()[1], np.uint8)[column.offset * width : (column.offset + len(column)) * width]
    return raw.view(_DTYPES[output.dtype]).reshape(len(column), *output.shape).astype(np.float32)
