"""``int4``: the sixteen largest logits of a row as float16, the others in 16 steps below the largest of these others.

The sixteen would widen the steps of all others. Two codes share a byte.
"""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.format.codec.encoding import (
    Encoding,
    Rows,
    check_num_classes,
    from_codes,
    id_field,
    largest,
    step_of,
    to_codes,
)
from schemas.cache_format import Output, RowField

_NUM_EXACT = 16
_MAX_CODE = 15
# With fewer classes, int8 takes no more bytes.
_MIN_CLASSES = 128


def _describe(name: str, shape: tuple[int, ...], kind: str) -> Output:
    width = prod(shape)
    check_num_classes(kind, width, minimum=_MIN_CLASSES, next_step="set cache.logits=int8")
    fields = (
        RowField(name="next", dtype="<f4", count=1),
        RowField(name="step", dtype="<f4", count=1),
        id_field(width, _NUM_EXACT),
        RowField(name="largest", dtype="<f2", count=_NUM_EXACT),
        RowField(name="codes", dtype="|u1", count=-(-width // 2)),
    )
    return Output(name=name, shape=shape, dtype="uint8", encoding="int4", fields=fields)


def _pack(values_NK: NDArray[np.float32], rows_N: Rows, *_: object) -> None:
    ids_Nk = largest(values_NK, _NUM_EXACT + 1)
    largest_Nk = np.take_along_axis(values_NK, ids_Nk, axis=1)
    next_N1, ids_Nk = largest_Nk[:, -1:], ids_Nk[:, :-1]
    below_NK = next_N1 - values_NK
    step_N1 = step_of(below_NK, _MAX_CODE)
    codes_NK = to_codes(below_NK, step_N1, _MAX_CODE)
    if codes_NK.shape[1] % 2:
        codes_NK = np.pad(codes_NK, ((0, 0), (0, 1)))
    rows_N["next"], rows_N["step"] = next_N1, step_N1
    rows_N["ids"], rows_N["largest"] = ids_Nk, largest_Nk[:, :-1]
    rows_N["codes"] = codes_NK[:, 0::2] | codes_NK[:, 1::2] << 4


def _unpack(rows_N: Rows, output: Output, _temperature: float) -> NDArray[np.float32]:
    packed_NC, width = rows_N["codes"], prod(output.shape)
    codes_NC2 = np.stack([packed_NC & 0xF, packed_NC >> 4], axis=2)
    codes_NK = codes_NC2.reshape(len(rows_N), 2 * packed_NC.shape[1])[:, :width]
    sixteen_NL = rows_N["next"] - from_codes(np.arange(_MAX_CODE + 1)[None], rows_N["step"])
    values_NK = np.take_along_axis(sixteen_NL, codes_NK.astype(np.int64), axis=1)
    np.put_along_axis(values_NK, rows_N["ids"].astype(np.int64), rows_N["largest"].astype(np.float32), axis=1)
    return values_NK


INT4 = Encoding("int4", ("int4",), _describe, _pack, _unpack)
