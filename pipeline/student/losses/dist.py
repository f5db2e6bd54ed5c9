"""DIST: match relations instead of probabilities (Huang 2022, 2205.10536)."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.student.losses.arithmetic import finite_pair, no_autocast

# Added to the product of the norms, as the paper's code does; it also masks classes absent from a saturated batch.
_EPS = 1e-8
# Of the student's root-mean-square probability. The gradient with respect to logits goes as p/‖p − mean‖, which has no
# bound as they become equal (a zero-initialised head). This floor bounds it near T·1e3, and logits that differ by
# more than about T/1000 never meet it, whatever K.
_STUDENT_NORM_FLOOR = 1e-3


def dist(
    student_BK: Tensor,
    teacher_BK: Tensor,
    *,
    temperature: float,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
) -> Tensor:
    """``T² · (inter_weight · inter + intra_weight · intra)`` over ``softmax(logits / T)``; 0 for a batch of no rows.

    inter is ``1 − r`` of student and teacher within a row, mean over rows; intra the same within a class over the
    batch, mean over classes; r is Pearson's correlation. One row has no relations over the batch: intra is then 1
    with zero gradient.

    Args:
        student_BK: logits ``[B,K]``, or ``[B,K,H,W]`` whose every pixel is a row; any floating type and size.
        teacher_BK: logits of the same shape; no gradient flows to them.
        temperature: T > 0, the same for both sides.
        inter_weight: β of the paper.
        intra_weight: γ of the paper.

    Returns:
        fp32 scalar.

    Raises:
        ModelError: the two shapes differ.
    """
    with no_autocast(student_BK):
        student_BK, teacher_BK = finite_pair(_rows(student_BK), _rows(teacher_BK))
        if not len(student_BK):
            return student_BK.sum()
        student_BK, teacher_BK = (student_BK / temperature).softmax(dim=1), (teacher_BK / temperature).softmax(dim=1)
        inter = 1 - _correlation(student_BK, teacher_BK, dim=1).mean()
        intra = 1 - _correlation(student_BK, teacher_BK, dim=0).mean()
        return temperature**2 * (inter_weight * inter + intra_weight * intra)


def _rows(logits_BK: Tensor) -> Tensor:
    """``[B,K]`` as it is, ``[B,K,H,W]`` as ``[B·H·W,K]``."""
    return logits_BK.movedim(1, -1).flatten(0, -2)


def _correlation(student_BK: Tensor, teacher_BK: Tensor, *, dim: int) -> Tensor:
    """Pearson's r along ``dim``: ``[B]`` for 1, ``[K]`` for 0."""
    student_centred_BK = student_BK - student_BK.mean(dim, keepdim=True)
    teacher_centred_BK = teacher_BK - teacher_BK.mean(dim, keepdim=True)
    floor = _STUDENT_NORM_FLOOR * student_BK.detach().square().mean(dim).sqrt()
    student_norm = torch.linalg.vector_norm(student_centred_BK, dim=dim).clamp_min(floor)
    teacher_norm = torch.linalg.vector_norm(teacher_centred_BK, dim=dim)
    return (student_centred_BK * teacher_centred_BK).sum(dim) / (student_norm * teacher_norm + _EPS)
