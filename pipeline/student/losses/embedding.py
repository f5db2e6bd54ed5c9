"""Losses on embeddings: towards the teacher's (cosine, mse, smooth_l1), or towards a larger norm (sifn)."""

from __future__ import annotations

import torch
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


@register("cosine")
def cosine(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """``1 − cos(student, teacher)``, mean over the rows; 0 for a batch of no rows.

    Norms below 1e-4 count as 1e-4: a zero embedding has cosine 0, and gradients fit fp16.

    Args:
        student_BD: embeddings ``[B,D]`` of the teacher's width, any floating type.
        teacher_BD: embeddings ``[B,D]``; no gradient flows to them.

    Returns:
        fp32 scalar.

    Raises:
        ModelError: the two shapes differ.
    """
    with no_autocast(student_BD):
        student_BD, teacher_BD = _pair(student_BD, teacher_BD)
        return row_mean(1 - functional.cosine_similarity(student_BD, teacher_BD, dim=1, eps=MIN_NORM))


@register("mse")
def mse(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """``(student − teacher)²``, mean over rows and dimensions; 0 for a batch of no rows. Entries are clamped to ±3e4.

    The hint loss of FitNets (Romero 2015, 1412.6550) on the last embedding.

    Args:
        student_BD: embeddings ``[B,D]`` of the teacher's width, any floating type.
        teacher_BD: embeddings ``[B,D]``; no gradient flows to them.

    Returns:
        fp32 scalar.

    Raises:
        ModelError: the two shapes differ.
    """
    with no_autocast(student_BD):
        student_BD, teacher_BD = _pair(student_BD, teacher_BD)
        student_BD, teacher_BD = (side_BD.clamp(-MAX_SQUARED, MAX_SQUARED) for side_BD in (student_BD, teacher_BD))
        return row_mean(functional.mse_loss(student_BD, teacher_BD, reduction="none").mean(dim=1))


@register("smooth_l1")
def smooth_l1(student_BD: Tensor, teacher_BD: Tensor, *, beta: float = 1.0) -> Tensor:
    """``d² / 2beta`` where ``d = |student − teacher| < beta``, else ``d − beta / 2``; mean over rows and dimensions.

    As ``mse`` near the teacher, but with a bounded gradient for the few large dimensions that some teachers have
    (Girshick 2015, 1504.08083). 0 for a batch of no rows.

    Args:
        student_BD: embeddings ``[B,D]`` of the teacher's width, any floating type.
        teacher_BD: embeddings ``[B,D]``; no gradient flows to them.
        beta: above 0, in units of the embedding.

    Returns:
        fp32 scalar.

    Raises:
        ModelError: the two shapes differ.
    """
    with no_autocast(student_BD):
        student_BD, teacher_BD = _pair(student_BD, teacher_BD)
        return row_mean(functional.smooth_l1_loss(student_BD, teacher_BD, reduction="none", beta=beta).mean(dim=1))


@register("sifn")
def sifn(embedding_BD: Tensor, *, increase: float = 1.0) -> Tensor:
    """``(‖s‖ − (‖s‖.detach() + increase))²``, mean over the rows; 0 for a batch of no rows.

    Its value is always ``increase²``. Its gradient is ``−2 · increase`` along each row's direction, so that norms grow
    step by step. An ablation of the ND paper (Wang 2023, 2305.17007), from Xu 2019 (1811.07456). Takes no teacher.

    Args:
        embedding_BD: the student's embedding ``[B,D]``, any floating type; a zero row has no direction and no gradient.
        increase: target increase of the norm, in units of the embedding.

    Returns:
        fp32 scalar.
    """
    with no_autocast(embedding_BD):
        norm_B = torch.linalg.vector_norm(finite_embedding(embedding_BD), dim=1)
        # Norms are subtracted first: a small increase would be lost in a large norm.
        return row_mean((norm_B - norm_B.detach() - increase).square())


def _pair(student_BD: Tensor, teacher_BD: Tensor) -> tuple[Tensor, Tensor]:
    check_same_shape(
        student_BD,
        teacher_BD,
        of="embeddings",
        expected="one shape [B,D]: the same rows, the teacher's width",
        next_step="project the student's embedding to the teacher's width",
    )
    return finite_embedding(student_BD), finite_embedding(teacher_BD.detach())
