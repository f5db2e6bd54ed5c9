"""``int8``: 256 equal steps between the smallest and the largest number of a row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.format.codec.encoding import Encoding, Rows
from schemas.cache_format import Output, RowField

_LAST = 255


def int8_output(name: str, width: int) -> Output:
    fields = (
        RowField(name="offset", dtype="<f4", count=1),
        RowField(name="scale", dtype="<f4", count=1),
        RowField(name="codes", dtype="|u1", count=width),
    )
    return Output(name=name, shape=(width,), dtype="uint8", encoding="int8", fields=fields)


def _pack(values_ND: NDArray[np.float32], rows_N: Rows) -> None:
    # The smallest number is stored as it is: it (of a ReLU's output, zero) and a constant row come back exactly.
    offset_N1 = values_ND.min(axis=1, keepdims=True)
    scale_N1 = (values_ND.max(axis=1, keepdims=True) - offset_N1) / np.float32(_LAST)
    # A span of a few denormals has a scale of zero, and is constant for all that float32 can tell.
    codes_ND = np.rint((values_ND - offset_N1) / np.where(scale_N1 > 0, scale_N1, np.float32(np.inf)))
    rows_N["offset"], rows_N["scale"], rows_N["codes"] = offset_N1, scale_N1, np.minimum(codes_ND, _LAST)


def _unpack(rows_N: Rows, _output: Output, _temperature: float) -> NDArray[np.float32]:
    return rows_N["offset"] + rows_N["scale"] * rows_N["codes"].astype(np.float32)


INT8 = Encoding(_pack, _unpack)
