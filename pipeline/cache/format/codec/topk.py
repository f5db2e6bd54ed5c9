"""``topk:k``: the k largest logits of a row, and the total softmax weight of the others at four temperatures.

k stored probabilities would give the share of the others at T = 1 alone, and overestimate it at any higher T. This
encoding stores the *level* of the others for four temperatures: the one logit that, used for each of them, leaves the
sum of their softmax weights unchanged. Between these temperatures, the level is interpolated in 1/T, in which it is
linear where the others are normally distributed.
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

TEMPERATURES = (1.0, 2.0, 4.0, 10.0)
_MAX_CODE = 255


def topk_fields(num_classes: int, kind: str) -> tuple[RowField, ...]:
    """
    Raises:
        ConfigError: there are no classes beyond the k of the value of the config.
    """
    k = int(kind.removeprefix("topk:"))
    check_num_classes(kind, num_classes, minimum=k + 1, next_step="choose a smaller k, or cache.logits=int8")
    return (
        RowField(name="top", dtype="<f2", count=1),
        RowField(name="step", dtype="<f2", count=1),
        RowField(name="levels", dtype="|u1", count=len(TEMPERATURES)),
        id_field(num_classes, k),
        RowField(name="codes", dtype="|u1", count=k),
    )


def _describe(name: str, shape: tuple[int, ...], kind: str) -> Output:
    fields = topk_fields(prod(shape), kind)
    return Output(name=name, shape=shape, dtype="uint8", encoding="topk", fields=fields, temperatures=TEMPERATURES)


def pack_topk(values_NK: NDArray[np.float32], rows_N: Rows, *_: object) -> None:
    """Fills the ``topk_fields`` of rows."""
    ids_Nk = largest(values_NK, rows_N.dtype["ids"].shape[0])
    largest_Nk = np.take_along_axis(values_NK, ids_Nk, axis=1)
    levels_N4 = _levels(values_NK, ids_Nk)
    top_N1 = largest_Nk[:, :1]
    # Levels fall with the temperature and lie below all k logits, so the last level is the lowest stored number.
    step_N1 = _round_up(step_of(top_N1 - levels_N4[:, -1:], _MAX_CODE))
    codes_Nk = to_codes(top_N1 - largest_Nk, step_N1, _MAX_CODE)
    # Only logits equal to the largest share its code 0.
    codes_Nk = np.maximum(codes_Nk, largest_Nk < top_N1)
    rows_N["top"], rows_N["step"], rows_N["ids"], rows_N["codes"] = top_N1, step_N1, ids_Nk, codes_Nk
    rows_N["levels"] = to_codes(top_N1 - levels_N4, step_N1, _MAX_CODE)


def _levels(values_NK: NDArray[np.float32], ids_Nk: NDArray[np.int64]) -> NDArray[np.float32]:
    """[N,4]: T · (logsumexp(others / T) − log(number of others))."""
    others_NK = values_NK.copy()
    np.put_along_axis(others_NK, ids_Nk, -np.inf, axis=1)
    max_N1 = others_NK.max(axis=1, keepdims=True)
    others_NK -= max_N1
    num_all, num_others = values_NK.shape[1], values_NK.shape[1] - ids_Nk.shape[1]
    means_N4 = np.concatenate([np.exp(others_NK / t).mean(axis=1, keepdims=True) for t in TEMPERATURES], axis=1)
    return (max_N1 + np.array(TEMPERATURES) * np.log(means_N4 * (num_all / num_others))).astype(np.float32)


def _round_up(step_N1: NDArray[np.floating]) -> NDArray[np.floating]:
    """Rounds up to float16, so that 255 steps reach the lowest level."""
    half_N1 = step_N1.astype(np.float16)
    return np.where(half_N1 < step_N1, np.nextafter(half_N1, np.float16(np.inf)), half_N1).astype(np.float32)


def _unpack(rows_N: Rows, output: Output, temperature: float) -> NDArray[np.float32]:
    return unpack_topk(rows_N, prod(output.shape), output.temperatures, temperature)


def unpack_topk(
    rows_N: Rows, num_classes: int, temperatures: tuple[float, ...], temperature: float
) -> NDArray[np.float32]:
    """[N,K]; ``temperatures`` are those of the output."""
    top_N1 = rows_N["top"].astype(np.float32)
    levels_N4 = top_N1 - from_codes(rows_N["levels"], rows_N["step"])
    values_NK = np.repeat(_interpolate(levels_N4, temperatures, temperature), num_classes, axis=1)
    largest_Nk = top_N1 - from_codes(rows_N["codes"], rows_N["step"])
    np.put_along_axis(values_NK, rows_N["ids"].astype(np.int64), largest_Nk, axis=1)
    return values_NK


def _interpolate(
    levels_N4: NDArray[np.float32], temperatures: tuple[float, ...], temperature: float
) -> NDArray[np.float32]:
    """[N,1] at a temperature, linearly in 1/T; outside of the stored range, the nearest level."""
    inverse = 1 / np.array(temperatures)
    position = float(np.interp(-1 / temperature, -inverse, np.arange(len(inverse))))
    before = min(int(position), len(inverse) - 2)
    share = position - before
    return (levels_N4[:, [before]] * (1 - share) + levels_N4[:, [before + 1]] * share).astype(np.float32)


TOPK = Encoding("topk", ("topk",), _describe, pack_topk, _unpack, depends_on_temperature=True)
