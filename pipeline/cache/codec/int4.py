"""``int4``: the sixteen largest logits of a row as float16, the others in 16 steps that widen downwards.

The largest would stretch the steps of all others, and of these the upper ones weigh most in any softmax. So a code
counts equal steps of log(1 + d / 3), where d is how far a logit lies below the largest of the others. Two codes share
a byte.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec.encoding import Encoding, Rows, id_field, largest
from schemas.manifest import Output, RowField

NUM_EXACT = 16
_LAST = 15
# Logits are in nats: within about this distance of the largest of the others the steps are nearly equal.
_KNEE = 3.0


def int4_output(name: str, width: int) -> Output:
    fields = (
        RowField(name="next", dtype="<f4", count=1),
        RowField(name="step", dtype="<f4", count=1),
        id_field(width, NUM_EXACT),
        RowField(name="largest", dtype="<f2", count=NUM_EXACT),
        RowField(name="codes", dtype="|u1", count=-(-width // 2)),
    )
    return Output(name=name, shape=(width,), dtype="uint8", encoding="int4", fields=fields)


def _pack(values_NK: NDArray[np.float32], rows_N: Rows) -> None:
    ids_Nk = largest(values_NK, NUM_EXACT + 1)
    largest_Nk = np.take_along_axis(values_NK, ids_Nk, axis=1)
    next_N1, ids_Nk = largest_Nk[:, -1:], ids_Nk[:, :-1]
    logs_NK = np.log1p(np.maximum(next_N1 - values_NK, 0) / _KNEE)
    step_N1 = logs_NK.max(axis=1, keepdims=True) / _LAST
    codes_NK = np.rint(logs_NK / np.where(step_N1 > 0, step_N1, np.inf)).astype(np.uint8)
    if codes_NK.shape[1] % 2:
        codes_NK = np.pad(codes_NK, ((0, 0), (0, 1)))
    rows_N["next"], rows_N["step"] = next_N1, step_N1
    rows_N["ids"], rows_N["largest"] = ids_Nk, largest_Nk[:, :-1]
    rows_N["codes"] = codes_NK[:, 0::2] | codes_NK[:, 1::2] << 4


def _unpack(rows_N: Rows, output: Output, _temperature: float) -> NDArray[np.float32]:
    below_NL = _KNEE * np.expm1(rows_N["step"] * np.arange(_LAST + 1, dtype=np.float32))
    packed_NC, (width,) = rows_N["codes"], output.shape
    codes_NC2 = np.stack([packed_NC & 0xF, packed_NC >> 4], axis=2)
    codes_NK = codes_NC2.reshape(len(rows_N), 2 * packed_NC.shape[1])[:, :width]
    values_NL = (rows_N["next"] - below_NL).astype(np.float32, copy=False)
    values_NK = np.take_along_axis(values_NL, codes_NK.astype(np.int64), axis=1)
    np.put_along_axis(values_NK, rows_N["ids"].astype(np.int64), rows_N["largest"].astype(np.float32), axis=1)
    return values_NK


INT4 = Encoding(_pack, _unpack)
