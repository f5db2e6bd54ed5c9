"""``int8``: 256 equal steps between the smallest and the largest number of a row."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.format.codec.encoding import Encoding, Rows
from schemas.cache_format import Output, RowField

_MAX_CODE = 255


def _describe(name: str, shape: tuple[int, ...], _kind: str) -> Output:
    width = prod(shape)
    fields = (
        RowField(name="offset", dtype="<f4", count=1),
        RowField(name="scale", dtype="<f4", count=1),
        RowField(name="codes", dtype="|u1", count=width),
    )
    return Output(name=name, shape=shape, dtype="uint8", encoding="int8", fields=fields)


def _pack(values_ND: NDArray[np.float32], rows_N: Rows, *_: object) -> None:
    # The smallest number (of a ReLU's output, zero) and constant rows are decoded exactly.
    offset_N1 = values_ND.min(axis=1, keepdims=True)
    scale_N1 = (values_ND.max(axis=1, keepdims=True) - offset_N1) / np.float32(_MAX_CODE)
    # The scale of a span of a few denormals rounds to zero: such a row counts as constant.
    codes_ND = np.rint((values_ND - offset_N1) / np.where(scale_N1 > 0, scale_N1, np.float32(np.inf)))
    rows_N["offset"], rows_N["scale"], rows_N["codes"] = offset_N1, scale_N1, np.minimum(codes_ND, _MAX_CODE)


def _unpack(rows_N: Rows, _output: Output, _temperature: float) -> NDArray[np.float32]:
    return rows_N["offset"] + rows_N["scale"] * rows_N["codes"].astype(np.float32)


INT8 = Encoding("int8", ("int8",), _describe, _pack, _unpack)
