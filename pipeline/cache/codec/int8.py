"""``int8``: 256 equal steps between the smallest and the largest number of a row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.encoding import Encoding, Rows
from schemas.manifest import Output, RowField

_LAST = 255


def int8_output(name: str, width: int) -> Output:
    fields = (
        RowField(name="offset", dtype="<f4", count=1),
        RowField(name="scale", dtype="<f4", count=1),
        RowField(name="codes", dtype="|u1", count=width),
    )
    return Output(name=name, shape=(width,), dtype="uint8", encoding="int8", fields=fields)


def steps(values_ND: NDArray[np.float32], num_steps: int) -> tuple[NDArray[np.float32], ...]:
    """offset [N,1], scale [N,1] and codes [N,D], whole numbers of 0 to ``num_steps``.

    The offset is the smallest number, so that it (of a ReLU's output, zero) and a constant row come back exactly. The
    scale is infinite where a row spans more than float32 holds.
    """
    offset_N1 = values_ND.min(axis=1, keepdims=True)
    scale_N1 = (values_ND.max(axis=1, keepdims=True) - offset_N1) / np.float32(num_steps)
    # Spans of a few denormals have a scale of zero: they are constant for all that float32 can tell.
    codes_ND = np.rint((values_ND - offset_N1) / np.where(scale_N1 > 0, scale_N1, np.float32(np.inf)))
    return offset_N1, scale_N1, codes_ND


def _pack(values_ND: NDArray[np.float32], rows_N: Rows) -> None:
    offset_N1, scale_N1, codes_ND = steps(values_ND, _LAST)
    rows_N["offset"], rows_N["scale"], rows_N["codes"] = offset_N1, scale_N1, np.minimum(codes_ND, _LAST)


def _unpack(rows_N: Rows, _output: Output, _temperature: float) -> NDArray[np.float32]:
    return rows_N["offset"] + rows_N["scale"] * rows_N["codes"].astype(np.float32)


INT8 = Encoding(_pack, _unpack)
