"""Teacher outputs for a batch: stored encoded, decoded at the temperatures of the losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.cache.format.codec import column_of
from pipeline.cache.read.reader import StoredRows
from pipeline.student.data.batch_summary import Summarised
from schemas.cache_format import Output


@dataclass(frozen=True, slots=True, repr=False)
class TeacherOutputs(Summarised):
    """One teacher's outputs for B rows, as losses take them.

    Attributes:
        logits: fp32 [B,K] by the temperature of the loss that reads them; under None where they do not depend on it.
        norm_B: fp32, of the embeddings.
        embedding_BD: fp32; None where no loss reads it, or the cache has none.
    """

    logits: Mapping[float | None, Tensor]
    norm_B: Tensor
    embedding_BD: Tensor | None = None

    def logits_at(self, temperature: float) -> Tensor | None:
        """[B,K] for a loss at this temperature; None: they were not decoded for it, or there are none."""
        return self.logits.get(None, self.logits.get(temperature))

    def map(self, function: Callable[[Tensor], Tensor]) -> TeacherOutputs:
        """Applies a function to each tensor."""
        return TeacherOutputs(
            {key: function(logits_BK) for key, logits_BK in self.logits.items()},
            function(self.norm_B),
            None if self.embedding_BD is None else function(self.embedding_BD),
        )


def decode_outputs(
    columns: Mapping[str, NDArray[Any]], outputs: Mapping[str, Output], temperatures: Sequence[float]
) -> TeacherOutputs:
    """Decodes the columns of one cached teacher (see ``SampleRows``), for a whole batch at once.

    Args:
        outputs: of the teacher's cache, by name.
        temperatures: at which losses read logits; without any, none are decoded. Logits that do not depend on the
            temperature are decoded once.
    """
    stored = {
        name: StoredRows(column_of(columns[name]), outputs[name]) for name in ("logits", "embedding") if name in columns
    }
    logits, embedding = stored.get("logits"), stored.get("embedding")
    by_temperature: dict[float | None, NDArray[np.float32]] = {}
    if logits is not None and temperatures:
        if logits.depends_on_temperature:
            by_temperature = {temperature: logits.decode(temperature=temperature) for temperature in temperatures}
        else:
            by_temperature = {None: logits.decode()}
    return TeacherOutputs(
        {key: torch.from_numpy(logits_BK) for key, logits_BK in by_temperature.items()},
        torch.from_numpy(columns["norm"]),
        None if embedding is None else torch.from_numpy(embedding.decode()),
    )
