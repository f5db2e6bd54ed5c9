"""DIST: match relations instead of probabilities (Huang 2022, 2205.10536)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.student.losses.arithmetic import finite_pair, no_autocast

# Added to the product of the norms, as the paper's code does; it also masks classes absent from a saturated batch.
_EPS = 1e-8
# Of the student's root-mean-square probability. The gradient with respect to logits goes as p/‖p − mean‖, which has no
# bound as they become equal (a zero-initialised head). This floor bounds it near T·1e3, and logits that differ by
# more than about T/1000 never meet it, whatever K.
_STUDENT_NORM_FLOOR = 1e-3
# Keeps the gradient of the root finite where a class has no probability in any row; far below what _EPS masks.
_SMALLEST_SQUARE = 1e-30


SumOverRanks = Callable[[Tensor], Tensor]
"""The sum over ranks, on every rank; each rank's part gets the gradient of all ranks' losses."""


def dist(
    student_BK: Tensor,
    teacher_BK: Tensor,
    *,
    temperature: float,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    gather: bool = False,
    sum_over_ranks: SumOverRanks | None = None,
) -> Tensor:
    """``T² · (inter_weight · inter + intra_weight · intra)`` over ``softmax(logits / T)``; 0 for a batch of no rows.

    inter is ``1 − r`` of student and teacher within a row, mean over rows; intra the same within a class over the
    batch, mean over classes; r is Pearson's correlation. One row has no relations over the batch: intra is then 1
    with zero gradient.

    With ``gather`` the batch is that of all ranks: the value is the same on each of them, and the mean over ranks of
    the gradients is its gradient, whatever rows each rank has. What crosses the ranks are sums of each class, twice:
    correlations need no more of the other ranks' rows, and centred sums lose no digits to cancellation.

    Args:
        student_BK: logits ``[B,K]``, or ``[B,K,H,W]`` whose every pixel is a row; any floating type and size.
        teacher_BK: logits of the same shape; no gradient flows to them.
        temperature: T > 0, the same for both sides.
        inter_weight: β of the paper.
        intra_weight: γ of the paper.
        gather: relations over the rows of all ranks, each of which must call this.
        sum_over_ranks: how to sum over them; comes with ``gather``.

    Returns:
        fp32 scalar.

    Raises:
        ModelError: the two shapes differ.
    """
    assert not gather or sum_over_ranks is not None, "gather comes with sum_over_ranks"
    total = sum_over_ranks if gather and sum_over_ranks is not None else _own
    with no_autocast(student_BK):
        student_BK, teacher_BK = finite_pair(_rows(student_BK), _rows(teacher_BK))
        student_BK, teacher_BK = (student_BK / temperature).softmax(dim=1), (teacher_BK / temperature).softmax(dim=1)
        inter_B = 1 - _correlation(student_BK, teacher_BK, dim=1, total=_own)
        inter, num_rows = total(torch.stack([inter_B.sum(), inter_B.new_full((), len(inter_B))])).unbind()
        intra = 1 - _correlation(student_BK, teacher_BK, dim=0, total=total).mean()
        # Without any row there are no relations to miss either.
        intra = intra * num_rows.clamp_max(1)
        return temperature**2 * (inter_weight * inter / num_rows.clamp_min(1) + intra_weight * intra)


def _own(sums: Tensor) -> Tensor:
    """The sum over one rank."""
    return sums


def _rows(logits_BK: Tensor) -> Tensor:
    """``[B,K]`` as it is, ``[B,K,H,W]`` as ``[B·H·W,K]``."""
    return logits_BK.movedim(1, -1).flatten(0, -2)


def _correlation(student_BK: Tensor, teacher_BK: Tensor, *, dim: int, total: SumOverRanks) -> Tensor:
    """Pearson's r along ``dim``: ``[B]`` for 1, ``[K]`` for 0. ``total`` adds the sums along ``dim`` over ranks."""
    student_mean, teacher_mean, student_square = _means(student_BK, teacher_BK, dim=dim, total=total)
    student_BK, teacher_BK = student_BK - student_mean.unsqueeze(dim), teacher_BK - teacher_mean.unsqueeze(dim)
    sums = [(student_BK * teacher_BK).sum(dim), student_BK.square().sum(dim), teacher_BK.square().sum(dim)]
    product, student_sum, teacher_sum = total(torch.stack(sums)).unbind()
    floor = (_STUDENT_NORM_FLOOR**2 * student_square).clamp_min(_SMALLEST_SQUARE)
    return product / (student_sum.clamp_min(floor).sqrt() * teacher_sum.sqrt() + _EPS)


@torch.no_grad()
def _means(student_BK: Tensor, teacher_BK: Tensor, *, dim: int, total: SumOverRanks) -> Tensor:
    """Means along ``dim`` of student, teacher and the student's square: ``[3,B]`` or ``[3,K]``.

    No gradient is lost: deviations from a mean sum to 0, so moving the mean changes no sum of their products.
    """
    sums = [student_BK.sum(dim), teacher_BK.sum(dim), student_BK.square().sum(dim)]
    counts = torch.full_like(sums[0], student_BK.shape[dim])
    *sums, counts = total(torch.stack([*sums, counts])).unbind()
    return torch.stack(sums) / counts.clamp_min(1)
