"""DIST: matches relations instead of probabilities (Huang 2022, 2205.10536)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.student.losses.arithmetic import finite_pair, no_autocast
from pipeline.student.losses.registry import register

# Added to the product of the norms, as in the paper's code; it also masks classes absent from a saturated batch.
_EPS = 1e-8
# Relative to the student's root-mean-square probability. The gradient by the logits grows as p/‖p − mean‖, without
# bound as the logits become equal (a zero-initialised head). This floor bounds it near T·1e3, and does not affect
# logits that differ by more than about T/1000, for any K.
_STUDENT_NORM_FLOOR = 1e-3
# Keeps the gradient of the root finite where a class has no probability in any row; far below what _EPS masks.
_MIN_SQUARE = 1e-30

MIN_LABELS = 10
"""Multilabel heads with fewer labels have no relations within a row. A correlation over so few values depends mostly on
which label has the largest probability: over two labels it is 1 or -1."""

SumOverRanks = Callable[[Tensor], Tensor]
"""The sum over ranks, on every rank; the gradient of each rank's summand is that of all ranks' losses."""


@register("dist")
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
    batch, mean over classes; r is Pearson's correlation. A batch of one row has no relations: intra is then 1 with zero
    gradient.

    With ``gather`` the batch is the global batch: the value is the same on every rank, and the mean over ranks of the
    gradients is its gradient, for any distribution of the rows. The ranks exchange two rounds of sums per class, of
    which the second are centred, so that no digits are lost to cancellation.

    Args:
        student_BK: logits ``[B,K]``, or ``[B,K,H,W]``, in which each pixel is a row; any floating type and size.
        teacher_BK: logits of the same shape; no gradient flows to them.
        temperature: T > 0, the same for both sides.
        inter_weight: β of the paper.
        intra_weight: γ of the paper.
        gather: relations over the rows of all ranks. Every rank must call this function.
        sum_over_ranks: the sum over ranks; comes with ``gather``.

    Returns:
        fp32 scalar.

    Raises:
        ModelError: the two shapes differ.
    """
    return dist_of_rows(
        as_rows(student_BK),
        as_rows(teacher_BK),
        temperature=temperature,
        inter_weight=inter_weight,
        intra_weight=intra_weight,
        total=total_over(sum_over_ranks, gather=gather),
    )


def dist_of_rows(
    student_BK: Tensor,
    teacher_BK: Tensor,
    *,
    temperature: float,
    inter_weight: float,
    intra_weight: float,
    total: SumOverRanks,
    counted_B: Tensor | None = None,
) -> Tensor:
    """``dist``, where ``total`` adds sums over ranks, of those rows ``[B]`` that are counted; None: all are."""
    with no_autocast(student_BK):
        student_BK, teacher_BK = finite_pair(student_BK, teacher_BK)
        student_BK, teacher_BK = (student_BK / temperature).softmax(dim=1), (teacher_BK / temperature).softmax(dim=1)
        return temperature**2 * _relations(student_BK, teacher_BK, inter_weight, intra_weight, total, counted_B)


@register("dist", kind="multilabel")
def dist_multilabel(
    student_BK: Tensor,
    teacher_BK: Tensor,
    *,
    temperature: float,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    gather: bool = False,
    sum_over_ranks: SumOverRanks | None = None,
) -> Tensor:
    """``dist`` over ``sigmoid(logits / T)``, a probability for each row and label.

    inter is left out below ten labels. intra, the relations among the rows of a label, needs no number of labels.
    The paper has softmax alone.

    Args:
        student_BK: logits ``[B,K]`` of any floating type and size. The other arguments are those of ``dist``.

    Returns:
        fp32 scalar.

    Raises:
        ModelError: the two shapes differ.
    """
    total = total_over(sum_over_ranks, gather=gather)
    with no_autocast(student_BK):
        student_BK, teacher_BK = finite_pair(student_BK, teacher_BK)
        student_BK, teacher_BK = (student_BK / temperature).sigmoid(), (teacher_BK / temperature).sigmoid()
        if student_BK.shape[1] < MIN_LABELS:
            inter_weight = 0.0
        return temperature**2 * _relations(student_BK, teacher_BK, inter_weight, intra_weight, total)


def _relations(
    student_BK: Tensor,
    teacher_BK: Tensor,
    inter_weight: float,
    intra_weight: float,
    total: SumOverRanks,
    counted_B: Tensor | None = None,
) -> Tensor:
    """Of probabilities; ``counted_B`` as of ``dist``."""
    inter_B = 1 - _correlation(student_BK, teacher_BK, dim=1, total=_rank_sum)
    num_counted = inter_B.new_full((), len(inter_B))
    if counted_B is not None:
        inter_B, num_counted = torch.where(counted_B, inter_B, 0.0), counted_B.sum().to(inter_B)
    inter, num_rows = total(torch.stack([inter_B.sum(), num_counted])).unbind()
    intra = 1 - _correlation(student_BK, teacher_BK, dim=0, total=total, counted_B=counted_B).mean()
    # 0 for a batch of no rows.
    intra = intra * num_rows.clamp_max(1)
    return inter_weight * inter / num_rows.clamp_min(1) + intra_weight * intra


def total_over(sum_over_ranks: SumOverRanks | None, *, gather: bool) -> SumOverRanks:
    """The function that adds sums over ranks if ``gather``, else returns those of this rank."""
    assert not gather or sum_over_ranks is not None, "gather comes with sum_over_ranks"
    return sum_over_ranks if gather and sum_over_ranks is not None else _rank_sum


def _rank_sum(sums: Tensor) -> Tensor:
    """The sum over this rank alone."""
    return sums


def as_rows(logits_BK: Tensor) -> Tensor:
    """``[B,K]`` as it is, ``[B,K,H,W]`` as ``[B·H·W,K]``."""
    return logits_BK.movedim(1, -1).flatten(0, -2)


def _correlation(
    student_BK: Tensor, teacher_BK: Tensor, *, dim: int, total: SumOverRanks, counted_B: Tensor | None = None
) -> Tensor:
    """Pearson's r along ``dim``: ``[B]`` for 1, ``[K]`` for 0. ``total`` adds these sums over ranks."""
    student_mean, teacher_mean, student_square = _means(
        student_BK, teacher_BK, dim=dim, total=total, counted_B=counted_B
    )
    student_BK, teacher_BK = student_BK - student_mean.unsqueeze(dim), teacher_BK - teacher_mean.unsqueeze(dim)
    if counted_B is not None:
        student_BK, teacher_BK = (torch.where(counted_B[:, None], side_BK, 0.0) for side_BK in (student_BK, teacher_BK))
    sums = [(student_BK * teacher_BK).sum(dim), student_BK.square().sum(dim), teacher_BK.square().sum(dim)]
    product, student_sum, teacher_sum = total(torch.stack(sums)).unbind()
    floor = (_STUDENT_NORM_FLOOR**2 * student_square).clamp_min(_MIN_SQUARE)
    return product / (student_sum.clamp_min(floor).sqrt() * teacher_sum.sqrt() + _EPS)


@torch.no_grad()
def _means(
    student_BK: Tensor, teacher_BK: Tensor, *, dim: int, total: SumOverRanks, counted_B: Tensor | None
) -> Tensor:
    """Means along ``dim`` of student, teacher and the student's square: ``[3,B]`` or ``[3,K]``.

    They need no gradient: deviations from a mean sum to 0, so the derivative by the mean vanishes.
    """
    num_counted: int | Tensor = student_BK.shape[dim]
    if counted_B is not None:
        student_BK, teacher_BK = (torch.where(counted_B[:, None], side_BK, 0.0) for side_BK in (student_BK, teacher_BK))
        num_counted = counted_B.sum()
    sums = [student_BK.sum(dim), teacher_BK.sum(dim), student_BK.square().sum(dim)]
    counts = torch.ones_like(sums[0]) * num_counted
    *sums, counts = total(torch.stack([*sums, counts])).unbind()
    return torch.stack(sums) / counts.clamp_min(1)
