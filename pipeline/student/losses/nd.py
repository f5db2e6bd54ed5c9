"""ND: norm and direction of the student's embedding (Wang 2023, 2305.17007)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.core.errors import CacheError
from pipeline.student.losses.arithmetic import SMALLEST_NORM, is_labelled, labelled_mean, no_autocast

_NUM_CLASSES_NAMED = 5


@dataclass(frozen=True, slots=True)
class ClassDirections:
    """Class means as ``nd`` takes them: they never change in a run, so direction and length are told apart once."""

    unit_KD: Tensor
    """fp32 unit vectors along the means; zero where there is no direction."""
    norm_K: Tensor
    """fp32 lengths of the means; NaN where the class was not seen."""

    @classmethod
    def of(cls, class_means_KD: Tensor) -> ClassDirections:
        """Of means ``[K,D]``; a row that is not finite marks a class that was not seen."""
        with no_autocast(class_means_KD):
            means_KD = class_means_KD.detach().float()
            norm_K = torch.linalg.vector_norm(means_KD, dim=1)
            norm_K = torch.where(norm_K.isfinite(), norm_K, torch.nan)
            return cls(torch.where((norm_K > 0)[:, None], means_KD / norm_K[:, None], 0.0), norm_K)


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

    s is the student's embedding, ‖t‖ the norm of the teacher's, e the unit vector along the class mean. Where the
    student is the shorter, the gradient is ``−e / (‖t‖ · rows)``: grow along e. Where it is as long or longer, the loss
    is 1 − cosine, without radial gradient. With mixing, e lies along ``lambda * mean + (1 - lambda) * mixed_mean``,
    and the row counts only if both labels are there.

    A row whose mean has no direction (zero norm, or not finite), whose embeddings are both shorter than 1e-4, or whose
    own norm overflows fp32, contributes 0, while the divisor stays the number of labelled rows. ``check_class_means``
    refuses missing means before a run; here nothing is looked at on the host, so that no step waits for the device.

    Args:
        student_BD: embeddings ``[B,D]`` of the teacher's width, any floating type.
        teacher_norm_B: ``[B]``, norms of the teacher's unnormalised embeddings.
        class_directions: of the teacher's mean embedding of each of K classes.
        labels_B: int64 ``[B]`` in ``[0, K)``; -1 where there is none.
        mixed_labels_B: int64 ``[B]``, the labels of the mixup partners. Comes with ``lambda_B``.
        lambda_B: ``[B]``, each row's own share of its mixed pixels.

    Returns:
        fp32 scalar.
    """
    assert (mixed_labels_B is None) == (lambda_B is None), "mixed_labels_B and lambda_B come together"
    with no_autocast(student_BD):
        unit_BD, norm_B = _of_labels(class_directions, labels_B)
        if mixed_labels_B is not None and lambda_B is not None:
            unit_BD, norm_B = _mixed(unit_BD, norm_B, *_of_labels(class_directions, mixed_labels_B), lambda_B.float())
        # Without a direction there is no length to reach either; a NaN here makes the row count for nothing.
        teacher_norm_B = torch.where(norm_B > 0, teacher_norm_B.detach().float(), torch.nan)
        loss_B, _, _ = _Shortfall.apply(student_BD.float(), unit_BD, teacher_norm_B)
        return labelled_mean(loss_B, is_labelled(labels_B, mixed_labels_B))


def _of_labels(directions: ClassDirections, labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors ``[B,D]`` and lengths ``[B]``; a row without a label takes class 0's, to be left out of the mean."""
    labels_B = labels_B.clamp_min(0)
    return directions.unit_KD.index_select(0, labels_B), directions.norm_K.index_select(0, labels_B)


def _mixed(
    unit_BD: Tensor, norm_B: Tensor, other_unit_BD: Tensor, other_norm_B: Tensor, lambda_B: Tensor
) -> tuple[Tensor, Tensor]:
    """The same of the mixed means; no direction where one of them was not seen."""
    own_B, other_B = lambda_B * norm_B, (1 - lambda_B) * other_norm_B
    # Units of classes that were not seen are zero, but NaN times zero is not.
    mean_BD = unit_BD * own_B.nan_to_num()[:, None] + other_unit_BD * other_B.nan_to_num()[:, None]
    mixed_norm_B = torch.linalg.vector_norm(mean_BD, dim=1)
    seen_B = own_B.isfinite() & other_B.isfinite()
    unit_BD = mean_BD / torch.where(mixed_norm_B > 0, mixed_norm_B, 1.0)[:, None]
    return unit_BD, torch.where(seen_B, mixed_norm_B, torch.nan)


class _Shortfall(torch.autograd.Function):
    """``1 − s·e / max(‖s‖, ‖t‖)`` of each row, with the gradient in closed form.

    Embeddings are wide: a graph of single operations passes over them, and makes new ones, far more often.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(student_BD: Tensor, unit_BD: Tensor, teacher_norm_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss ``[B]``; and of its gradient how much of e and of s it is made of, 0 where the row counts for
        nothing."""
        own_norm_B = torch.linalg.vector_norm(student_BD, dim=1)
        along_B = torch.linalg.vecdot(student_BD, unit_BD)
        # torch.maximum would split the gradient at a tie, and leave a radial part there.
        is_longer_B = own_norm_B >= teacher_norm_B
        length_B = torch.where(is_longer_B, own_norm_B, teacher_norm_B)
        counts_B = length_B.isfinite() & own_norm_B.isfinite() & (length_B >= SMALLEST_NORM)
        cosine_B = along_B / length_B
        return (
            torch.where(counts_B, 1 - cosine_B, 0.0),
            torch.where(counts_B, -1 / length_B, 0.0),
            torch.where(counts_B & is_longer_B, cosine_B / length_B / length_B, 0.0),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        student_BD, unit_BD, _ = inputs
        ctx.save_for_backward(student_BD, unit_BD, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        student_BD, unit_BD, of_unit_B, of_own_B = ctx.saved_tensors
        gradient_B = gradients[0]
        gradient_BD = unit_BD * (gradient_B * of_unit_B)[:, None]
        return gradient_BD.addcmul_(student_BD, (gradient_B * of_own_B)[:, None]), None, None


def check_class_means(class_means_KD: Tensor, label_counts_K: Tensor, *, where: str) -> None:
    """Refuses, once before a run, class means that ``nd`` would miss.

    Args:
        class_means_KD: ``[K,D]``; a row that is not finite marks a class without a mean.
        label_counts_K: integers ``[K]``, how often each class occurs among the training labels.
        where: the cache, for the message.

    Raises:
        CacheError: K differs, or a class occurs in the labels but has no mean; names the first such classes.
    """
    if len(class_means_KD) != len(label_counts_K):
        raise CacheError(
            "the class means are not of this data's classes",
            code="cache.class-means-of-other-classes",
            where=where,
            got=f"K = {len(class_means_KD)}",
            expected=f"K = {len(label_counts_K)}",
            next_step="check data.num_classes, or build the cache over this data",
        )
    missing_K = (label_counts_K > 0) & ~class_means_KD.isfinite().all(dim=1)
    classes: list[int] = missing_K.nonzero()[:, 0].tolist()
    if classes:
        named = ", ".join(map(str, classes[:_NUM_CLASSES_NAMED]))
        raise CacheError(
            "classes occur in the labels but have no mean, which nd needs",
            code="cache.missing-class-means",
            where=where,
            got=f"{len(classes)} without a mean: {named}{', …' if len(classes) > _NUM_CLASSES_NAMED else ''}",
            expected="a mean for every class that occurs",
            next_step="build the cache over shards that hold these classes, or drop nd from the loss section",
        )
