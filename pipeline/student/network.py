"""The student: a network, and projectors to the teachers' widths that exist in training only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pipeline.models import EmbeddingModel


class Student(nn.Module):
    """forward(images_BCHW) -> (logits [B,K], embedding [B,D], by term one embedding [B,Dt] a teacher, in its width).

    Each term has projectors of its own, so that what one term asks of its projector is not what another gets.

    Args:
        terms: keys of the loss terms that take the embedding in a teacher's width.
        teacher_dims: Dt, one a teacher.
    """

    def __init__(self, model: EmbeddingModel, *, terms: Sequence[str] = (), teacher_dims: Sequence[int] = ()) -> None:
        super().__init__()
        self.model = model
        self.projectors = nn.ModuleDict(
            {key: nn.ModuleList(_bridge(model.embedding_dim, dim) for dim in teacher_dims) for key in terms}
        )

    @property
    def min_rows(self) -> int:
        """The fewest rows of a batch that it can be trained on: BatchNorm has no statistics of a single row."""
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        return 2 if any(isinstance(module, kinds) for module in self.modules()) else 1

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor, Mapping[str, tuple[Tensor, ...]]]:
        logits_BK, embedding_BD = self.model(images_BCHW)
        return logits_BK, embedding_BD, {key: self._project(key, embedding_BD) for key in self.projectors}

    def _project(self, key: str, embedding_BD: Tensor) -> tuple[Tensor, ...]:
        bridges: Any = self.projectors[key]
        return tuple(bridge(embedding_BD) for bridge in bridges)


def _bridge(student_dim: int, teacher_dim: int) -> nn.Module:
    return nn.Identity() if teacher_dim == student_dim else projector(student_dim, teacher_dim)


def projector(student_dim: int, teacher_dim: int) -> nn.Sequential:
    """BatchNorm, Dropout(0.5), Linear: the ND paper's bridge between widths (Wang 2023, official code)."""
    return nn.Sequential(nn.BatchNorm1d(student_dim), nn.Dropout(0.5), nn.Linear(student_dim, teacher_dim))
