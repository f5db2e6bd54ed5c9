"""Relations within a batch: the similarities of each row to the other rows, as probabilities (SEED, 2101.04731)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.core.errors import ModelError
from pipeline.student.losses.arithmetic import MIN_NORM, finite_embedding, no_autocast
from pipeline.student.losses.registry import register

JoinOverRanks = Callable[[Tensor], Tensor]
"""The rows of all ranks, on every rank; the gradient of each rank's rows is that of all ranks' losses."""


@register("similarity")
def similarity(
    embedding_BD: Tensor,
    teacher_BD: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    gather: bool = False,
    join_over_ranks: JoinOverRanks | None = None,
) -> Tensor:
    """``KL(softmax(t·t' / teacher_temperature) ‖ softmax(s·s' / student_temperature))``, mean over the rows.

    ``s·s'`` are the cosines of a row's embedding with those of all other rows of the batch; the cosine of a row with
    itself is left out. The two sides may have different widths, so no projector is needed. SEED (Fang 2021) takes the
    other rows from a queue of earlier batches, and has the cross-entropy instead, which has the same gradient. 0 for a
    batch of fewer than three rows, in which a row has at most one other. Norms below 1e-4 count as 1e-4.

    With ``gather`` the batch is the global batch: the value is the same on every rank, and the mean over ranks of the
    gradients is its gradient, for any distribution of the rows. The ranks exchange the embeddings once.

    Args:
        embedding_BD: the student's embeddings ``[B,D]``, any floating type.
        teacher_BD: embeddings of the same rows, of any width; no gradient flows to them.
        student_temperature: above 0.
        teacher_temperature: above 0; a lower one weights near rows more.
        gather: relations over the rows of all ranks. Every rank must call this function.
        join_over_ranks: the rows of all ranks; comes with ``gather``.

    Returns:
        fp32 scalar.

    Raises:
        ModelError: the two sides have different numbers of rows.
    """
    assert not gather or join_over_ranks is not None, "gather comes with join_over_ranks"
    if embedding_BD.shape[:-1] != teacher_BD.shape[:-1] or embedding_BD.ndim != 2:
        raise ModelError(
            "the embeddings of student and teacher have different rows",
            code="loss.shapes-differ",
            where="embeddings of one batch",
            got=f"student {list(embedding_BD.shape)}, teacher {list(teacher_BD.shape)}",
            expected="[B,D] of the same rows, of any widths",
        )
    with no_autocast(embedding_BD):
        student_BD, teacher_BD = _directions(embedding_BD), _directions(teacher_BD.detach())
        if gather and join_over_ranks is not None:
            joined_BD = join_over_ranks(torch.cat([student_BD, teacher_BD], dim=1))
            student_BD, teacher_BD = joined_BD.split([student_BD.shape[1], teacher_BD.shape[1]], dim=1)
        num_rows = len(student_BD)
        if num_rows < 2:
            return 0 * student_BD.sum()
        log_q_BM = (_other_cosines(student_BD) / student_temperature).log_softmax(dim=1)
        log_p_BM = (_other_cosines(teacher_BD.detach()) / teacher_temperature).log_softmax(dim=1)
        return functional.kl_div(log_q_BM, log_p_BM, reduction="none", log_target=True).sum(dim=1).mean()


def _directions(embedding_BD: Tensor) -> Tensor:
    return functional.normalize(finite_embedding(embedding_BD), dim=1, eps=MIN_NORM)


class _Products(torch.autograd.Function):
    """``x @ x.T`` in fp32: a backward pass inside of autocast would run the gradient's product in half precision."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows_BD: Tensor) -> Tensor:
        return rows_BD @ rows_BD.T

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (rows_BD,), (gradient_BB,) = ctx.saved_tensors, gradients
        with no_autocast(rows_BD):
            return (gradient_BB + gradient_BB.T) @ rows_BD


def _other_cosines(unit_BD: Tensor) -> Tensor:
    """``[B,B-1]``: the cosines of each row with the others, in their order."""
    size = len(unit_BD)
    cosine_BB: Tensor = _Products.apply(unit_BD)
    # Without its first entry, the matrix has a diagonal entry at the end of each row of B + 1.
    return cosine_BB.flatten()[1:].reshape(size - 1, size + 1)[:, :-1].reshape(size, size - 1)
