"""Teacher outputs for a batch: stored encoded, decoded at the temperatures of the losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.cache.format.codec import LinearHead, column_name, column_of
from pipeline.cache.read.reader import StoredRows
from pipeline.student.data.batch_summary import Summarised
from schemas.cache_format import Output

Reads = Mapping[str, tuple[float, ...]]
"""Outputs that losses read of each teacher: by name, the temperatures of these losses, ascending."""


@dataclass(frozen=True, slots=True, repr=False)
class TeacherOutputs(Summarised):
    """One teacher's outputs for B rows, as losses take them.

    Attributes:
        tensors: fp32 [B,…] by name and temperature of the loss that reads it; under the temperature None where it does
            not depend on it.
        norm_B: fp32, norms of the embeddings, as a cache stores them; None: it does not.
    """

    tensors: Mapping[tuple[str, float | None], Tensor]
    norm_B: Tensor | None = None

    def at(self, name: str, temperature: float = 1.0) -> Tensor | None:
        """An output for a loss at this temperature; None: it was not decoded for it, or there is none."""
        return self.tensors.get((name, None), self.tensors.get((name, temperature)))

    def norm_of(self, name: str) -> Tensor | None:
        """fp32 [B]: the stored norms, else those of this output; None: there are neither."""
        output_BD = self.at(name)
        return self.norm_B if self.norm_B is not None or output_BD is None else output_BD.norm(dim=1)

    def map(self, function: Callable[[Tensor], Tensor]) -> TeacherOutputs:
        """Applies a function to each tensor."""
        return TeacherOutputs(
            {key: function(tensor) for key, tensor in self.tensors.items()},
            None if self.norm_B is None else function(self.norm_B),
        )


def decode_outputs(
    columns: Mapping[str, NDArray[Any]], outputs: Mapping[str, Output], reads: Reads, head: LinearHead | None = None
) -> TeacherOutputs:
    """Decodes the columns of one cached teacher (see ``SampleRows``), for a whole batch at once.

    Args:
        outputs: of the teacher's cache, by name; those that are read.
        head: of the cache, see ``TeacherCache.head``.
    """
    tensors: dict[tuple[str, float | None], Tensor] = {}
    for name, output in outputs.items():
        stored = StoredRows(column_of(columns[column_name(output)]), output, head)
        if stored.depends_on_temperature:
            decoded = {temperature: stored.decode(temperature=temperature) for temperature in reads[name]}
        else:
            decoded = {None: stored.decode()}
        tensors |= {(name, temperature): torch.from_numpy(values) for temperature, values in decoded.items()}
    return TeacherOutputs(tensors, torch.from_numpy(columns["norm"]))
