"""``int4``: the sixteen largest logits of a row as float16, the others in 16 equal steps of their own.

A few large logits stretch a row: without them the steps of the others are several times finer. Two codes share a byte.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.encoding import Encoding, Rows, id_field, largest
from pipeline.cache.codec.int8 import steps
from schemas.manifest import Output, RowField

NUM_EXACT = 16
_LAST = 15


def int4_output(name: str, width: int) -> Output:
    fields = (
        RowField(name="offset", dtype="<f4", count=1),
        RowField(name="scale", dtype="<f4", count=1),
        id_field(width, NUM_EXACT),
        RowField(name="largest", dtype="<f2", count=NUM_EXACT),
        RowField(name="codes", dtype="|u1", count=-(-width // 2)),
    )
    return Output(name=name, shape=(width,), dtype="uint8", encoding="int4", fields=fields)


def _pack(values_NK: NDArray[np.float32], rows_N: Rows) -> None:
    ids_Nk = largest(values_NK, NUM_EXACT)
    largest_Nk = np.take_along_axis(values_NK, ids_Nk, axis=1)
    # The exact ones take the place of the largest of the others, which changes neither end of the steps.
    rest_NK = values_NK.copy()
    np.put_along_axis(rest_NK, ids_Nk, values_NK.min(axis=1, keepdims=True), axis=1)
    offset_N1, scale_N1, codes_NK = steps(rest_NK, _LAST)
    codes_NK = np.minimum(codes_NK, _LAST).astype(np.uint8)
    if codes_NK.shape[1] % 2:
        codes_NK = np.pad(codes_NK, ((0, 0), (0, 1)))
    rows_N["offset"], rows_N["scale"] = offset_N1, scale_N1
    rows_N["ids"], rows_N["largest"] = ids_Nk, largest_Nk
    rows_N["codes"] = codes_NK[:, 0::2] | codes_NK[:, 1::2] << 4


def _unpack(rows_N: Rows, output: Output, _temperature: float) -> NDArray[np.float32]:
    packed_NC, (width,) = rows_N["codes"], output.shape
    codes_NK = np.stack([packed_NC & 0xF, packed_NC >> 4], axis=2).reshape(len(rows_N), 2 * packed_NC.shape[1])[
        :, :width
    ]
    values_NK = rows_N["offset"] + rows_N["scale"] * codes_NK.astype(np.float32)
    np.put_along_axis(values_NK, rows_N["ids"].astype(np.int64), rows_N["largest"].astype(np.float32), axis=1)
    return values_NK


INT4 = Encoding(_pack, _unpack)
