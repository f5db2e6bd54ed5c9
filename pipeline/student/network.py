"""The student: a network, and where ND needs it a projector to the teacher's width that exists in training only."""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.models import EmbeddingModel


class Student(nn.Module):
    """forward(images_BCHW) -> (logits [B,K], embedding [B,Dt] in the teacher's width, or the student's own)."""

    def __init__(self, model: EmbeddingModel, *, teacher_dim: int | None) -> None:
        super().__init__()
        self.model = model
        needs_projector = teacher_dim is not None and teacher_dim != model.embedding_dim
        self.projector = projector(model.embedding_dim, teacher_dim) if needs_projector and teacher_dim else None

    @property
    def min_rows(self) -> int:
        """The fewest rows of a batch that it can be trained on: BatchNorm has no statistics of a single row."""
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        return 2 if any(isinstance(module, kinds) for module in self.modules()) else 1

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        logits_BK, embedding_BD = self.model(images_BCHW)
        return logits_BK, embedding_BD if self.projector is None else self.projector(embedding_BD)


def projector(student_dim: int, teacher_dim: int) -> nn.Sequential:
    """BatchNorm, Dropout(0.5), Linear: the ND paper's bridge between widths (Wang 2023, official code)."""
    return nn.Sequential(nn.BatchNorm1d(student_dim), nn.Dropout(0.5), nn.Linear(student_dim, teacher_dim))
