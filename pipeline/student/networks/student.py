"""The student: a network, and what some losses put around it in training only: projectors, fused feature maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from pipeline.models import EmbeddingModel, forward_with_maps, register_map_hooks
from pipeline.student.networks.review import Review, ReviewPlan

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class StudentOutputs(NamedTuple):
    """What losses take of the student. A tuple, in which DDP finds the tensors.

    Attributes:
        logits_BK: [B,K].
        embedding_BD: [B,D], in the student's own width.
        projected: by term one embedding [B,Dt] a teacher, in its width.
        maps: one [B,C,H,W] a reviewed level.
    """

    logits_BK: Tensor
    embedding_BD: Tensor
    projected: Mapping[str, tuple[Tensor, ...]]
    maps: tuple[Tensor, ...]


class Student(nn.Module):
    """A network as losses see it; ``forward(images_BCHW)`` answers with ``StudentOutputs``.

    Each term has projectors of its own, so that what one term asks of its projector is not what another gets.

    Args:
        terms: keys of the loss terms that take the embedding in a teacher's width.
        teacher_dims: Dt, one a teacher.
        review: the feature maps that ``review_kd`` compares; None: there are none.
    """

    def __init__(
        self,
        model: EmbeddingModel,
        *,
        terms: Sequence[str] = (),
        teacher_dims: Sequence[int] = (),
        review: ReviewPlan | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.projectors = nn.ModuleDict(
            {key: nn.ModuleList(bridge(model.embedding_dim, dim) for dim in teacher_dims) for key in terms}
        )
        self.review = None if review is None else Review(review)
        if review is not None:
            register_map_hooks(model.network, review.student)

    @property
    def min_rows(self) -> int:
        """The fewest rows of a batch that it can be trained on: BatchNorm has no statistics of a single row."""
        return 2 if any(isinstance(module, BATCH_NORMS) and module.training for module in self.modules()) else 1

    def forward(self, images_BCHW: Tensor) -> StudentOutputs:
        review = self.review
        named = () if review is None else review.plan.student
        (logits_BK, embedding_BD), maps = forward_with_maps(named, self.model, images_BCHW)
        # Fused here and not in the loss: DDP waits for the gradients of all that learns, so all of it runs in here.
        fused = () if review is None else review(review.plan.levels(maps, embedding_BD))
        projected = {key: self._project(key, embedding_BD) for key in self.projectors}
        return StudentOutputs(logits_BK, embedding_BD, projected, fused)

    def _project(self, key: str, embedding_BD: Tensor) -> tuple[Tensor, ...]:
        bridges: Any = self.projectors[key]
        return tuple(bridge(embedding_BD) for bridge in bridges)


def bridge(student_dim: int, teacher_dim: int) -> nn.Module:
    """From the student's width to a teacher's; the identity where they are the same."""
    return nn.Identity() if teacher_dim == student_dim else projector(student_dim, teacher_dim)


def projector(student_dim: int, teacher_dim: int) -> nn.Sequential:
    """BatchNorm, Dropout(0.5), Linear: the ND paper's bridge between widths (Wang 2023, official code)."""
    return nn.Sequential(nn.BatchNorm1d(student_dim), nn.Dropout(0.5), nn.Linear(student_dim, teacher_dim))
