"""``dense``: the numbers themselves, as float32 or float16."""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.cache.format.codec.encoding import Encoding, Rows
from schemas.cache_format import Output, RowField

_DTYPES = {"fp32": ("float32", "<f4"), "fp16": ("float16", "<f2")}


def _describe(name: str, shape: tuple[int, ...], kind: str) -> Output:
    width = prod(shape)
    dtype, field_dtype = _DTYPES[kind]
    fields = (RowField(name="values", dtype=field_dtype, count=width),)
    return Output(name=name, shape=shape, dtype=dtype, encoding="dense", fields=fields)


def _pack(values_ND: NDArray[np.float32], rows_N: Rows, *_: object) -> None:
    rows_N["values"] = values_ND


def _unpack(rows_N: Rows, _output: Output, _temperature: float) -> NDArray[np.float32]:
    # The same bits as NumPy's conversion of float16, several times as fast.
    return torch.from_numpy(rows_N["values"].copy()).float().numpy()


DENSE = Encoding("dense", tuple(_DTYPES), _describe, _pack, _unpack)
