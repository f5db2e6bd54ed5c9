"""Rows of samples on their way into a batch: a record of numbers each, an id, and what the teachers said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.student.data.teacher_outputs import StoredWords

Records = NDArray[np.void]
_DRAWN = "drawn/"
_PLACE = ["offset", "size", "content_hash"]


def as_records(fields: Mapping[str, NDArray[Any]], drawn: Mapping[str, NDArray[Any]]) -> Records:
    """[N] arrays, or [N, …], side by side. ``drawn`` are the columns of ``schemas.cache_format.drawn_columns``."""
    named = {**fields, **{_DRAWN + name: values_N for name, values_N in drawn.items()}}
    num_rows = len(next(iter(named.values())))
    record_N = np.empty(num_rows, [(name, values.dtype, values.shape[1:]) for name, values in named.items()])
    for name, values in named.items():
        record_N[name] = values
    return record_N


def drawn_fields(record_N: Records) -> dict[str, NDArray[Any]]:
    """What ``as_records`` was given as ``drawn``."""
    names = record_N.dtype.names or ()
    return {name.removeprefix(_DRAWN): record_N[name] for name in names if name.startswith(_DRAWN)}


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
    record_N: Records
    words: tuple[StoredWords, ...]

    @classmethod
    def placed(cls, pieces: Sequence[tuple[NDArray[np.int64], SampleRows]], num_rows: int) -> SampleRows:
        """One of ``num_rows`` out of pieces, each with the places of its rows; all places are filled."""
        sample_ids = [""] * num_rows
        record_N = np.empty(num_rows, pieces[0][1].record_N.dtype)
        for place_P, piece in pieces:
            record_N[place_P] = piece.record_N
            for place, sample_id in zip(place_P.tolist(), piece.sample_ids, strict=True):
                sample_ids[place] = sample_id
        words = zip(*([(place_P, said) for said in piece.words] for place_P, piece in pieces), strict=True)
        return cls(sample_ids, record_N, tuple(StoredWords.placed(of_teacher, num_rows) for of_teacher in words))

    def __len__(self) -> int:
        return len(self.record_N)

    @property
    def places(self) -> list[tuple[int, int, int]]:
        """Offset and size in bytes in the shard, and content hash, of each row."""
        return self.record_N[_PLACE].tolist()

    @property
    def drawn(self) -> dict[str, NDArray[Any]]:
        return drawn_fields(self.record_N)
