"""Losses on patch tokens: the student's tokens towards the teacher's, position by position."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from pipeline.student.losses.arithmetic import (
    MAX_SQUARED,
    MIN_NORM,
    check_same_shape,
    finite_embedding,
    no_autocast,
    row_mean,
)
from pipeline.student.losses.registry import register


@register("token_cosine")
def token_cosine(student_BPD: Tensor, teacher_BPD: Tensor) -> Tensor:
    """``1 − cos(student, teacher)`` of each token, mean over positions and rows; 0 for a batch of no rows.

    Norms below 1e-4 count as 1e-4: a token of zeros has cosine 0, and gradients fit fp16.

    Args:
        student_BPD: tokens ``[B,P,D]`` on the teacher's grid and in its width, any floating type.
        teacher_BPD: tokens ``[B,P,D]``; no gradient flows to them.

    Returns:
        fp32 scalar.

    Raises:
        ModelError: the two shapes differ.
    """
    with no_autocast(student_BPD):
        student_BPD, teacher_BPD = _pair(student_BPD, teacher_BPD)
        cosine_BP = functional.cosine_similarity(student_BPD, teacher_BPD, dim=2, eps=MIN_NORM)
        return row_mean((1 - cosine_BP).mean(dim=1))


@register("token_mse")
def token_mse(student_BPD: Tensor, teacher_BPD: Tensor) -> Tensor:
    """``(student − teacher)²``, mean over dimensions, positions and rows; 0 for a batch of no rows. Entries are clamped
    to ±3e4.

    Args:
        student_BPD: tokens ``[B,P,D]`` on the teacher's grid and in its width, any floating type.
        teacher_BPD: tokens ``[B,P,D]``; no gradient flows to them.

    Returns:
        fp32 scalar.

    Raises:
        ModelError: the two shapes differ.
    """
    with no_autocast(student_BPD):
        student_BPD, teacher_BPD = (x.clamp(-MAX_SQUARED, MAX_SQUARED) for x in _pair(student_BPD, teacher_BPD))
        return row_mean(functional.mse_loss(student_BPD, teacher_BPD, reduction="none").mean(dim=(1, 2)))


def _pair(student_BPD: Tensor, teacher_BPD: Tensor) -> tuple[Tensor, Tensor]:
    check_same_shape(
        student_BPD,
        teacher_BPD,
        of="patch tokens",
        expected="one shape [B,P,D]: the same rows, the teacher's grid and width",
        next_step="resample the student's tokens to the teacher's grid, and project them to its width",
    )
    return finite_embedding(student_BPD), finite_embedding(teacher_BPD.detach())
