"""The student in training: a network, with the projectors and the fused feature maps that some losses need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from pipeline.models import EmbeddingModel, forward_with_maps, register_map_hooks
from pipeline.student.networks.review import Review, ReviewPlan
from pipeline.tasks import EMBEDDING

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class StudentOutputs(NamedTuple):
    """The student's outputs for losses. A tuple, in which DDP finds the tensors.

    Attributes:
        outputs: of the network, by name.
        projected: by term, one embedding [B,Dt] for each teacher, in the teacher's width.
        maps: one [B,C,H,W] for each level of ``review_kd``.
    """

    outputs: dict[str, Tensor]
    projected: Mapping[str, tuple[Tensor, ...]]
    maps: tuple[Tensor, ...]


class Student(nn.Module):
    """A network with the modules that losses train; ``forward(images_BCHW)`` returns ``StudentOutputs``.

    Each term has separate projectors, so that no term changes the projector of another.

    Args:
        terms: keys of the loss terms that take the embedding in a teacher's width.
        teacher_dims: Dt of each teacher.
        review: the feature maps that ``review_kd`` compares; None: the loss section has no ``review_kd``.
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
            {key: nn.ModuleList(projector_for(model.embedding_dim, dim) for dim in teacher_dims) for key in terms}
        )
        self.review = None if review is None else Review(review)
        if review is not None:
            register_map_hooks(model.network, review.student)

    @property
    def min_rows(self) -> int:
        """The smallest batch to train on: BatchNorm needs two rows."""
        return 2 if any(isinstance(module, BATCH_NORMS) and module.training for module in self.modules()) else 1

    def forward(self, images_BCHW: Tensor) -> StudentOutputs:
        review = self.review
        named = () if review is None else review.plan.student
        outputs, maps = forward_with_maps(named, self.model, images_BCHW)
        embedding_BD = outputs[EMBEDDING]
        # Fused here and not in the loss: DDP expects all trained modules to run in this forward.
        fused = () if review is None else review(review.plan.levels(maps, embedding_BD))
        projected = {key: self._project(key, embedding_BD) for key in self.projectors}
        return StudentOutputs(outputs, projected, fused)

    def _project(self, key: str, embedding_BD: Tensor) -> tuple[Tensor, ...]:
        projectors: Any = self.projectors[key]
        return tuple(projector(embedding_BD) for projector in projectors)


def projector_for(student_dim: int, teacher_dim: int) -> nn.Module:
    """From the student's width to a teacher's: BatchNorm, Dropout(0.5), Linear as in the ND paper's code (Wang 2023).

    The identity if the widths are equal.
    """
    if teacher_dim == student_dim:
        return nn.Identity()
    return nn.Sequential(nn.BatchNorm1d(student_dim), nn.Dropout(0.5), nn.Linear(student_dim, teacher_dim))
