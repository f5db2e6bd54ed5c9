"""``int8t``: the twelve largest logits of a row as float16 above the next one, the others in 256 equal steps below it.

``int8`` gives logits that lie within a step of the largest one the same code, so the largest class is lost in a row of
many classes. Here the first class is the only one with the largest number.
"""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.format.codec.encoding import Encoding, Rows, check_num_classes, id_field, largest
from schemas.cache_format import Output, RowField

_NUM_EXACT = 12
_MAX_CODE = 255
_MIN_CLASSES = 256


def _describe(name: str, shape: tuple[int, ...], kind: str) -> Output:
    width = prod(shape)
    check_num_classes(kind, width, minimum=_MIN_CLASSES, next_step="set cache.logits=int8")
    fields = (
        RowField(name="next", dtype="<f4", count=1),
        RowField(name="scale", dtype="<f4", count=1),
        id_field(width, _NUM_EXACT),
        RowField(name="above", dtype="<f2", count=_NUM_EXACT),
        RowField(name="codes", dtype="|u1", count=width),
    )
    return Output(name=name, shape=shape, dtype="uint8", encoding="int8t", fields=fields)


def _pack(values_NK: NDArray[np.float32], rows_N: Rows, *_: object) -> None:
    ids_Nk = largest(values_NK, _NUM_EXACT + 1)
    largest_Nk = np.take_along_axis(values_NK, ids_Nk, axis=1)
    next_N1 = largest_Nk[:, -1:]
    below_NK = np.maximum(next_N1 - values_NK, 0)
    scale_N1 = below_NK.max(axis=1, keepdims=True) / np.float32(_MAX_CODE)
    # As in int8: the scale of a span of a few denormals rounds to zero.
    codes_NK = np.rint(below_NK / np.where(scale_N1 > 0, scale_N1, np.float32(np.inf)))
    rows_N["next"], rows_N["scale"], rows_N["codes"] = next_N1, scale_N1, np.minimum(codes_NK, _MAX_CODE)
    rows_N["ids"], rows_N["above"] = ids_Nk[:, :-1], largest_Nk[:, :-1] - next_N1
    rows_N["above"][:, :1] = np.maximum(rows_N["above"][:, :1], _min_first(next_N1, rows_N["above"][:, 1:2]))


def _min_first(next_N1: NDArray[np.float32], second_N1: NDArray[np.float16]) -> NDArray[np.float16]:
    """The smallest float16 that added to ``next`` in float32 is more than the second largest logit, and more than its
    float16: near zero the difference of two neighbours in float32 is lost next to their distance from ``next``."""
    neighbour_N1 = np.nextafter(next_N1 + second_N1.astype(np.float32), np.float32(np.inf))
    exact_N1 = neighbour_N1.astype(np.float64) - next_N1
    rounded_N1 = exact_N1.astype(np.float16)
    up_N1 = np.where(rounded_N1 < exact_N1, np.nextafter(rounded_N1, np.float16(np.inf)), rounded_N1)
    return np.maximum(up_N1, np.nextafter(second_N1, np.float16(np.inf)))


def _unpack(rows_N: Rows, _output: Output, _temperature: float) -> NDArray[np.float32]:
    values_NK = rows_N["next"] - rows_N["scale"] * rows_N["codes"].astype(np.float32)
    exact_Nk = rows_N["next"] + rows_N["above"].astype(np.float32)
    np.put_along_axis(values_NK, rows_N["ids"].astype(np.int64), exact_Nk, axis=1)
    return values_NK


INT8T = Encoding("int8t", ("int8t",), _describe, _pack, _unpack)
