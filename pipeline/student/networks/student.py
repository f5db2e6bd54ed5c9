"""The student in training: a network, with the projectors and the fused feature maps that some losses need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn

from pipeline.models import EmbeddingModel, FeatureMap, forward_with_maps, register_map_hooks
from pipeline.student.networks.review import Review, ReviewPlan
from pipeline.student.networks.tokens import TokenProjector
from pipeline.tasks import EMBEDDING

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class StudentOutputs(NamedTuple):
    """The student's outputs for losses. A tuple, in which DDP finds the tensors.

    Attributes:
        outputs: of the network, by name.
        projected: by term, one embedding [B,Dt] for each teacher, in the teacher's width; or patch tokens [B,Pt,Dt].
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
        token_maps: the student's map whose positions are the patch tokens of a term, by its key.
        teacher_tokens: (Pt, Dt) of each teacher; empty without such terms.
        review: the feature maps that ``review_kd`` compares; None: the loss section has no ``review_kd``.
        sync_batch_norm: BatchNorm layers in training take the statistics of all ranks, which must be on GPUs.
    """

    def __init__(
        self,
        model: EmbeddingModel,
        *,
        terms: Sequence[str] = (),
        teacher_dims: Sequence[int] = (),
        token_maps: Mapping[str, FeatureMap] | None = None,
        teacher_tokens: Sequence[tuple[int, int]] = (),
        review: ReviewPlan | None = None,
        sync_batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.token_maps = dict(token_maps or {})
        self.projectors = nn.ModuleDict(
            {key: nn.ModuleList(projector_for(model.embedding_dim, dim) for dim in teacher_dims) for key in terms}
            | {
                key: nn.ModuleList(TokenProjector(feature_map, shape) for shape in teacher_tokens)
                for key, feature_map in self.token_maps.items()
            }
        )
        self.review = None if review is None else Review(review)
        self._review_maps = () if review is None else review.student
        if sync_batch_norm:
            # It replaces layers, without their hooks: timm's, because torch's would drop the activations in some.
            convert_sync_batchnorm(self)
        by_layer = {item.layer: item for item in (*self._review_maps, *self.token_maps.values())}
        register_map_hooks(model.network, [*by_layer.values()])

    @property
    def min_rows(self) -> int:
        """The smallest batch of a rank to train on: BatchNorm needs two rows, if it takes those of this rank alone."""
        norms = (module for module in self.modules() if isinstance(module, BATCH_NORMS) and module.training)
        return 1 if all(isinstance(norm, nn.SyncBatchNorm) for norm in norms) else 2

    def forward(self, images_BCHW: Tensor) -> StudentOutputs:
        review, num_levels = self.review, len(self._review_maps)
        named = (*self._review_maps, *self.token_maps.values())
        outputs, maps = forward_with_maps(named, self.model, images_BCHW)
        embedding_BD: Tensor = outputs[EMBEDDING]
        # Fused here and not in the loss: DDP expects all trained modules to run in this forward.
        fused = () if review is None else review(review.plan.levels(maps[:num_levels], embedding_BD))
        features: dict[str, Tensor] = dict.fromkeys(self.projectors, embedding_BD)
        features |= zip(self.token_maps, maps[num_levels:], strict=True)
        projected = {key: self._project(key, tensor) for key, tensor in features.items()}
        return StudentOutputs(outputs, projected, fused)

    def _project(self, key: str, features: Tensor) -> tuple[Tensor, ...]:
        projectors: Any = self.projectors[key]
        return tuple(projector(features) for projector in projectors)


def projector_for(student_dim: int, teacher_dim: int) -> nn.Module:
    """From the student's width to a teacher's: BatchNorm, Dropout(0.5), Linear as in the ND paper's code (Wang 2023).

    The identity if the widths are equal.
    """
    if teacher_dim == student_dim:
        return nn.Identity()
    return nn.Sequential(nn.BatchNorm1d(student_dim), nn.Dropout(0.5), nn.Linear(student_dim, teacher_dim))
