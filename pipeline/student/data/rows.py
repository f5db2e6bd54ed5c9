"""Rows of samples on their way into a batch: a record of numbers each, an id, and what the teachers said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.student.data.teacher_outputs import EncodedTeacherOutputs

StructuredRows = NDArray[np.void]
_DRAWN = "drawn/"
_PLACE = ["offset", "size", "content_hash"]


def as_structured_rows(fields: Mapping[str, NDArray[Any]], drawn: Mapping[str, NDArray[Any]]) -> StructuredRows:
    """[N] arrays, or [N, …], side by side. ``drawn`` are the columns of ``schemas.cache_format.aug_param_columns``."""
    named = {**fields, **{_DRAWN + name: values_N for name, values_N in drawn.items()}}
    num_rows = len(next(iter(named.values())))
    rows_N = np.empty(num_rows, [(name, values.dtype, values.shape[1:]) for name, values in named.items()])
    for name, values in named.items():
        rows_N[name] = values
    return rows_N


def drawn_fields(rows_N: StructuredRows) -> dict[str, NDArray[Any]]:
    """What ``as_structured_rows`` was given as ``drawn``."""
    names = rows_N.dtype.names or ()
    return {name.removeprefix(_DRAWN): rows_N[name] for name in names if name.startswith(_DRAWN)}


@dataclass(frozen=True, slots=True)
class SampleRows:
    """N rows under one view: where their bytes are, how they are cropped, what the teachers said.

    Attributes:
        record_N: numbers that are taken together are stored together: a step takes few rows of many shards, and pays
            for each array it touches. Fields: offset, size, content_hash (of the image's bytes in its shard), label,
            width, height (pixels after EXIF rotation), box [4], flip, mix_lambda, partner (ordinal among the shard's
            ok rows; a row's own where it is not mixed), and the drawn ones; maybe others.
        words: of each cache; none where views are drawn here.
    """

    sample_ids: list[str]
    rows_N: StructuredRows
    words: tuple[EncodedTeacherOutputs, ...]

    @classmethod
    def placed(cls, pieces: Sequence[tuple[NDArray[np.int64], SampleRows]], num_rows: int) -> SampleRows:
        """One of ``num_rows`` out of pieces, each with the places of its rows; all places are filled."""
        sample_ids = [""] * num_rows
        rows_N = np.empty(num_rows, pieces[0][1].rows_N.dtype)
        for place_P, piece in pieces:
            rows_N[place_P] = piece.rows_N
            for place, sample_id in zip(place_P.tolist(), piece.sample_ids, strict=True):
                sample_ids[place] = sample_id
        words = zip(*([(place_P, said) for said in piece.words] for place_P, piece in pieces), strict=True)
        return cls(
            sample_ids, rows_N, tuple(EncodedTeacherOutputs.placed(of_teacher, num_rows) for of_teacher in words)
        )

    def __len__(self) -> int:
        return len(self.rows_N)

    @property
    def places(self) -> list[tuple[int, int, int]]:
        """Offset and size in bytes in the shard, and content hash, of each row."""
        return self.rows_N[_PLACE].tolist()

    @property
    def drawn(self) -> dict[str, NDArray[Any]]:
        return drawn_fields(self.rows_N)
