"""``topk:k`` of a map [K,h,w]: the row of ``topk`` at every position, field by field.

The fields of ``topk`` lie in planes of h · w positions: neighbours of an image are neighbours in a plane, where their
classes and codes repeat, so that pages compress to about half.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.format.codec.encoding import Encoding, Rows
from pipeline.cache.format.codec.topk import TEMPERATURES, pack_topk, topk_fields, unpack_topk
from schemas.cache_format import Output, RowField

NAME = "topk_map"


def _describe(name: str, shape: tuple[int, ...], kind: str) -> Output:
    num_classes, height, width = shape
    fields = tuple(
        RowField(name=field.name, dtype=field.dtype, count=field.count * height * width)
        for field in topk_fields(num_classes, kind)
    )
    return Output(name=name, shape=shape, dtype="uint8", encoding=NAME, fields=fields, temperatures=TEMPERATURES)


def _position_dtype(rows_N: Rows, num_positions: int) -> np.dtype[np.void]:
    """The fields of one position."""
    fields = rows_N.dtype.fields or {}
    return np.dtype([(name, kind.base, (kind.shape[0] // num_positions,)) for name, (kind, *_) in fields.items()])


def _pack(values_ND: NDArray[np.float32], rows_N: Rows, output: Output, *_: object) -> None:
    num_classes, height, width = output.shape
    dtype = _position_dtype(rows_N, height * width)
    # One map at a time: the work of a position takes several times its bytes.
    for row, values_D in enumerate(values_ND):
        positions_P = np.zeros(height * width, dtype)
        pack_topk(np.ascontiguousarray(values_D.reshape(num_classes, -1).T), positions_P)
        for name in dtype.names or ():
            rows_N[name][row] = positions_P[name].T.reshape(-1)


def _unpack(rows_N: Rows, output: Output, temperature: float) -> NDArray[np.float32]:
    num_classes, height, width = output.shape
    num_positions = height * width
    dtype = _position_dtype(rows_N, num_positions)
    values_NKP = np.empty((len(rows_N), num_classes, num_positions), np.float32)
    for row, values_KP in enumerate(values_NKP):
        positions_P = np.empty(num_positions, dtype)
        for name in dtype.names or ():
            positions_P[name] = rows_N[name][row].reshape(-1, num_positions).T
        values_KP[:] = unpack_topk(positions_P, num_classes, output.temperatures, temperature).T
    return values_NKP.reshape(len(rows_N), -1)


TOPK_MAP = Encoding(NAME, (), _describe, _pack, _unpack, depends_on_temperature=True)
