"""The student: a network, and what some losses put around it in training only: projectors, fused feature maps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pipeline.models import EmbeddingModel, observe_maps, with_maps
from pipeline.student.review import Review, ReviewPlan

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Student(nn.Module):
    """forward(images_BCHW) -> (logits [B,K], one embedding [B,Dt] a teacher, in its width, one map a reviewed level).

    Args:
        teacher_dims: one a teacher; None takes the student's embedding in its own width.
        review: the feature maps that ``review_kd`` compares; None: there are none.
    """

    def __init__(
        self, model: EmbeddingModel, *, teacher_dims: Sequence[int | None], review: ReviewPlan | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.projectors = nn.ModuleList(_bridge(model.embedding_dim, teacher_dim) for teacher_dim in teacher_dims)
        self.review = None if review is None else Review(review)
        if review is not None:
            observe_maps(model.network, review.student)

    @property
    def min_rows(self) -> int:
        """The fewest rows of a batch that it can be trained on: BatchNorm has no statistics of a single row."""
        return 2 if any(isinstance(module, BATCH_NORMS) and module.training for module in self.modules()) else 1

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        review = self.review
        named = () if review is None else review.plan.student
        (logits_BK, embedding_BD), maps = with_maps(named, self.model, images_BCHW)
        # Fused here and not in the loss: DDP waits for the gradients of all that learns, so all of it runs in here.
        fused = () if review is None else review(review.plan.levels(maps, embedding_BD))
        return logits_BK, tuple(project(embedding_BD) for project in self.projectors), fused


def _bridge(student_dim: int, teacher_dim: int | None) -> nn.Module:
    if teacher_dim is None or teacher_dim == student_dim:
        return nn.Identity()
    return projector(student_dim, teacher_dim)


def projector(student_dim: int, teacher_dim: int) -> nn.Sequential:
    """BatchNorm, Dropout(0.5), Linear: the ND paper's bridge between widths (Wang 2023, official code)."""
    return nn.Sequential(nn.BatchNorm1d(student_dim), nn.Dropout(0.5), nn.Linear(student_dim, teacher_dim))
