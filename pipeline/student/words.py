"""What one teacher says of some rows: encoded as long as it is kept, dense for the temperatures it is read at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.cache.reader import StoredRows, ViewColumns


@dataclass(frozen=True, slots=True)
class StoredWords:
    """Of N rows, as a cache keeps it. ``logits`` is None where the cache has only norms."""

    logits: StoredRows | None
    norm_N: NDArray[np.float32]

    @classmethod
    def of(cls, columns: ViewColumns, row_N: NDArray[np.int32]) -> StoredWords:
        """Some rows of a view, by ordinal."""
        logits = columns.logits
        return cls(None if logits is None else logits.take(row_N), columns.embedding_norm_N[row_N])

    @classmethod
    def placed(cls, pieces: Sequence[tuple[NDArray[np.integer[Any]], StoredWords]], num_rows: int) -> StoredWords:
        """One of ``num_rows`` out of pieces, each with the places of its rows; all places are filled."""
        norm_N = np.empty(num_rows, np.float32)
        for place_P, words in pieces:
            norm_N[place_P] = words.norm_N
        logits = [(place_P, words.logits) for place_P, words in pieces if words.logits is not None]
        return cls(StoredRows.placed(logits, num_rows) if logits else None, norm_N)

    def dense(self, temperatures: Sequence[float]) -> dict[float | None, NDArray[np.float32]]:
        """[N,K] by temperature, as in ``TeacherWords``: each decoded once, one for all where they are the same."""
        if self.logits is None or not temperatures:
            return {}
        if not self.logits.depends_on_temperature:
            return {None: self.logits.dense()}
        return {temperature: self.logits.dense(temperature=temperature) for temperature in temperatures}


@dataclass(frozen=True, slots=True)
class TeacherWords:
    """Of B rows, as losses take it.

    Attributes:
        logits: fp32 [B,K] by the temperature of the loss that reads them; under None where they are the same at any.
        norm_B: fp32, of the embeddings.
    """

    logits: Mapping[float | None, Tensor]
    norm_B: Tensor

    def logits_at(self, temperature: float) -> Tensor | None:
        """[B,K] as a loss at this temperature sees them; None: nobody asked for them, or there are none."""
        return self.logits.get(None, self.logits.get(temperature))

    def map(self, move: Callable[[Tensor], Tensor]) -> TeacherWords:
        """The same, each tensor moved."""
        return TeacherWords({key: move(logits_BK) for key, logits_BK in self.logits.items()}, move(self.norm_B))
