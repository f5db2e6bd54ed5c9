"""What one teacher says of some rows: encoded as long as it is kept, dense for the temperatures it is read at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.cache.read.reader import StoredRows, ViewColumns
from pipeline.student.data.batch_summary import Summarised


@dataclass(frozen=True, slots=True)
class EncodedTeacherOutputs:
    """Of N rows, as a cache keeps it. ``logits`` is None where the cache has none, ``embedding`` also where no loss
    reads it."""

    logits: StoredRows | None
    norm_N: NDArray[np.float32]
    embedding: StoredRows | None = None

    @classmethod
    def of(cls, columns: ViewColumns, row_N: NDArray[np.int32]) -> EncodedTeacherOutputs:
        """Some rows of a view, by ordinal."""
        logits, embedding = (
            None if stored is None else stored.take(row_N) for stored in (columns.logits, columns.embedding)
        )
        return cls(logits, columns.embedding_norm_N[row_N], embedding)

    @classmethod
    def placed(
        cls, pieces: Sequence[tuple[NDArray[np.integer[Any]], EncodedTeacherOutputs]], num_rows: int
    ) -> EncodedTeacherOutputs:
        """One of ``num_rows`` out of pieces, each with the places of its rows; all places are filled."""
        norm_N = np.empty(num_rows, np.float32)
        for place_P, words in pieces:
            norm_N[place_P] = words.norm_N
        logits = [(place_P, words.logits) for place_P, words in pieces]
        embeddings = [(place_P, words.embedding) for place_P, words in pieces]
        return cls(_placed(logits, num_rows), norm_N, _placed(embeddings, num_rows))

    def dense(self, temperatures: Sequence[float]) -> dict[float | None, NDArray[np.float32]]:
        """[N,K] by temperature, as in ``TeacherOutputs``: each decoded once, one for all where they are the same."""
        if self.logits is None or not temperatures:
            return {}
        if not self.logits.depends_on_temperature:
            return {None: self.logits.dense()}
        return {temperature: self.logits.dense(temperature=temperature) for temperature in temperatures}


def _placed(pieces: Sequence[tuple[NDArray[np.integer[Any]], StoredRows | None]], num_rows: int) -> StoredRows | None:
    there = [(place_P, stored) for place_P, stored in pieces if stored is not None]
    return StoredRows.placed(there, num_rows) if there else None


@dataclass(frozen=True, slots=True, repr=False)
class TeacherOutputs(Summarised):
    """Of B rows, as losses take it.

    Attributes:
        logits: fp32 [B,K] by the temperature of the loss that reads them; under None where they are the same at any.
        norm_B: fp32, of the embeddings.
        embedding_BD: fp32; None where no loss reads it, or there is none.
    """

    logits: Mapping[float | None, Tensor]
    norm_B: Tensor
    embedding_BD: Tensor | None = None

    def logits_at(self, temperature: float) -> Tensor | None:
        """[B,K] as a loss at this temperature sees them; None: nobody asked for them, or there are none."""
        return self.logits.get(None, self.logits.get(temperature))

    def map(self, move: Callable[[Tensor], Tensor]) -> TeacherOutputs:
        """The same, each tensor moved."""
        return TeacherOutputs(
            {key: move(logits_BK) for key, logits_BK in self.logits.items()},
            move(self.norm_B),
            None if self.embedding_BD is None else move(self.embedding_BD),
        )
