"""ND: norm and direction of the student's embedding (Wang 2023, 2305.17007)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.core.errors import CacheError
from pipeline.student.losses.arithmetic import MIN_NORM, is_labelled, labelled_mean, no_autocast
from pipeline.student.losses.registry import register

_MAX_CLASSES_IN_MESSAGE = 5


@dataclass(frozen=True, slots=True)
class ClassDirections:
    """Class means as ``nd`` takes them. They do not change in a run, so directions and norms are computed once."""

    unit_KD: Tensor
    """fp32 unit vectors along the means; zero for a mean without direction."""
    norm_K: Tensor
    """fp32 norms of the means; NaN for a class without a mean."""

    @classmethod
    def of(cls, class_means_KD: Tensor) -> ClassDirections:
        """From means ``[K,D]``; a row that is not finite marks a class without a mean."""
        with no_autocast(class_means_KD):
            means_KD = class_means_KD.detach().float()
            norm_K = torch.linalg.vector_norm(means_KD, dim=1)
            norm_K = torch.where(norm_K.isfinite(), norm_K, torch.nan)
            return cls(torch.where((norm_K > 0)[:, None], means_KD / norm_K[:, None], 0.0), norm_K)


@register("nd")
def nd(
    student_BD: Tensor,
    teacher_norm_B: Tensor,
    class_directions: ClassDirections,
    labels_B: Tensor,
    *,
    mixed_labels_B: Tensor | None = None,
    lambda_B: Tensor | None = None,
) -> Tensor:
    """``1 − s·e / max(‖s‖, ‖t‖)``, mean over the labelled rows; 0 with zero gradient when no row has a label.

    s is the student's embedding, ‖t‖ the norm of the teacher's, e the unit vector along the class mean. If the student
    is shorter, the gradient is ``−e / (‖t‖ · rows)``: it grows along e. If it is as long or longer, the loss is
    1 − cosine, without radial gradient. With mixing, e lies along ``lambda * mean + (1 - lambda) * mixed_mean``, and
    the row counts only if it has both labels.

    A row contributes 0, but counts in the divisor, if its mean has no direction (zero norm, or not finite), if both
    embeddings are shorter than 1e-4, or if the student's norm overflows fp32. ``check_class_means`` refuses missing
    means before a run; this function reads no value on the host, so that no step waits for the device.

    Args:
        student_BD: embeddings ``[B,D]`` of the teacher's width, any floating type.
        teacher_norm_B: ``[B]``, norms of the teacher's unnormalised embeddings.
        class_directions: of the teacher's mean embeddings of the K classes.
        labels_B: int64 ``[B]`` in ``[0, K)``; -1: no label.
        mixed_labels_B: int64 ``[B]``, the labels of the mixup partners. Comes with ``lambda_B``.
        lambda_B: ``[B]``, the share of the row's image in its mixed pixels.

    Returns:
        fp32 scalar.
    """
    assert (mixed_labels_B is None) == (lambda_B is None), "mixed_labels_B and lambda_B come together"
    with no_autocast(student_BD):
        unit_BD, norm_B = _directions(class_directions, labels_B)
        if mixed_labels_B is not None and lambda_B is not None:
            mixed = _directions(class_directions, mixed_labels_B)
            unit_BD, norm_B = _mix_directions((unit_BD, norm_B), mixed, lambda_B.float())
        # A NaN excludes the row: without a direction there is no target norm either.
        teacher_norm_B = torch.where(norm_B > 0, teacher_norm_B.detach().float(), torch.nan)
        loss_B, _, _ = _NormDirectionLoss.apply(student_BD.float(), unit_BD, teacher_norm_B)
        return labelled_mean(loss_B, is_labelled(labels_B, mixed_labels_B))


def _directions(directions: ClassDirections, labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors ``[B,D]`` and norms ``[B]``; of class 0 for rows without a label, which the mean leaves out."""
    labels_B = labels_B.clamp_min(0)
    return directions.unit_KD.index_select(0, labels_B), directions.norm_K.index_select(0, labels_B)


def _mix_directions(
    label: tuple[Tensor, Tensor], mixed: tuple[Tensor, Tensor], lambda_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Unit vector and norm of the mixed means; no direction if one of the classes has no mean."""
    (unit_BD, norm_B), (mixed_unit_BD, mixed_norm_B) = label, mixed
    norm_B, mixed_norm_B = lambda_B * norm_B, (1 - lambda_B) * mixed_norm_B
    # The unit vector of a class without a mean is zero, but NaN times zero is NaN.
    mean_BD = unit_BD * norm_B.nan_to_num()[:, None] + mixed_unit_BD * mixed_norm_B.nan_to_num()[:, None]
    mean_norm_B = torch.linalg.vector_norm(mean_BD, dim=1)
    has_means_B = norm_B.isfinite() & mixed_norm_B.isfinite()
    unit_BD = mean_BD / torch.where(mean_norm_B > 0, mean_norm_B, 1.0)[:, None]
    return unit_BD, torch.where(has_means_B, mean_norm_B, torch.nan)


class _NormDirectionLoss(torch.autograd.Function):
    """``1 − s·e / max(‖s‖, ‖t‖)`` of each row, with the gradient in closed form.

    Embeddings are wide: autograd over single operations would read and allocate them far more often.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(student_BD: Tensor, unit_BD: Tensor, teacher_norm_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss ``[B]``, and the factors of e and of s in its gradient, 0 for excluded rows."""
        norm_B = torch.linalg.vector_norm(student_BD, dim=1)
        along_B = torch.linalg.vecdot(student_BD, unit_BD)
        # torch.maximum would split the gradient at a tie, and leave a radial part.
        is_longer_B = norm_B >= teacher_norm_B
        length_B = torch.where(is_longer_B, norm_B, teacher_norm_B)
        is_included_B = length_B.isfinite() & norm_B.isfinite() & (length_B >= MIN_NORM)
        cosine_B = along_B / length_B
        return (
            torch.where(is_included_B, 1 - cosine_B, 0.0),
            torch.where(is_included_B, -1 / length_B, 0.0),
            torch.where(is_included_B & is_longer_B, cosine_B / length_B / length_B, 0.0),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        student_BD, unit_BD, _ = inputs
        ctx.save_for_backward(student_BD, unit_BD, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        student_BD, unit_BD, unit_factor_B, student_factor_B = ctx.saved_tensors
        gradient_B = gradients[0]
        gradient_BD = unit_BD * (gradient_B * unit_factor_B)[:, None]
        return gradient_BD.addcmul_(student_BD, (gradient_B * student_factor_B)[:, None]), None, None


def check_class_means(class_means_KD: Tensor, label_counts_K: Tensor, *, where: str) -> None:
    """Checks, once before a run, that ``nd`` has the class means that it needs.

    Args:
        class_means_KD: ``[K,D]``; a row that is not finite marks a class without a mean.
        label_counts_K: integers ``[K]``, how often each class occurs among the training labels.
        where: the cache, for messages.

    Raises:
        CacheError: K differs, or a class occurs in the labels but has no mean.
    """
    if len(class_means_KD) != len(label_counts_K):
        raise CacheError(
            "the class means have a different number of classes",
            code="cache.class-means-of-other-classes",
            where=where,
            got=f"K = {len(class_means_KD)}",
            expected=f"K = {len(label_counts_K)}",
            next_step="check data.num_classes, or build the cache over this data",
        )
    missing_K = (label_counts_K > 0) & ~class_means_KD.isfinite().all(dim=1)
    classes: list[int] = missing_K.nonzero()[:, 0].tolist()
    if classes:
        named = ", ".join(map(str, classes[:_MAX_CLASSES_IN_MESSAGE]))
        raise CacheError(
            "nd needs class means for classes that have none",
            code="cache.missing-class-means",
            where=where,
            got=f"{len(classes)} without a mean: {named}{', …' if len(classes) > _MAX_CLASSES_IN_MESSAGE else ''}",
            expected="a mean for every class that occurs",
            next_step="build the cache over shards that contain these classes, or drop nd from the loss section",
        )
