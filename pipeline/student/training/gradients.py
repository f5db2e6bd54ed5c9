"""Gradients of single rows and single terms: weights of rows, and the norm of each term's gradient at the embedding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.student.distributed import DistributedContext
from pipeline.student.networks.student import StudentOutputs


class _WeightRows(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a weight for each row."""

    @staticmethod
    def forward(rows: Tensor, weight_B: Tensor) -> Tensor:  # noqa: ARG004
        return rows.view_as(rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight_B,), (gradient,) = ctx.saved_tensors, gradients
        return gradient * weight_B.to(gradient.dtype).reshape(-1, *[1] * (gradient.dim() - 1)), None


def with_row_weights(student: StudentOutputs, weight_B: Tensor) -> StudentOutputs:
    """The same outputs, in whose gradients each row has its weight.

    For a loss that is a mean over rows this is the gradient of the weighted sum over the number of rows. Its value is
    not weighted.
    """

    def weigh(rows: Tensor) -> Tensor:
        weighted: Tensor = _WeightRows.apply(rows, weight_B)
        return weighted

    return StudentOutputs(
        {name: weigh(output) for name, output in student.outputs.items()},
        {term: tuple(weigh(rows) for rows in projected) for term, projected in student.projected.items()},
        tuple(weigh(level) for level in student.maps),
    )


class TermGradients:
    """Sums the squared gradients of single terms of one step over micro-batches and ranks."""

    def __init__(self, distributed: DistributedContext) -> None:
        self._distributed = distributed
        self._squares: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=distributed.device))

    def add(self, terms: Mapping[str, Tensor], embedding_BD: Tensor, *, scale: float) -> None:
        """Adds the rows of a micro-batch.

        Args:
            terms: the weighted summands of the loss, with the factors that make DDP's mean exact.
            embedding_BD: the output of the trunk, from which the terms are computed.
            scale: of the loss, so that no gradient in half precision is lost.
        """
        for term, value in terms.items():
            gradient = None
            if value.requires_grad and embedding_BD.requires_grad:
                (gradient,) = torch.autograd.grad(value * scale, embedding_BD, retain_graph=True, allow_unused=True)
            self._squares[term] += 0 if gradient is None else (gradient.float() / scale).square().sum()

    def norms(self) -> dict[str, Tensor]:
        """0-d, by term: the norm of the gradient of the global batch's loss by the embeddings of all its rows."""
        total = self._distributed.sum(torch.stack([*self._squares.values()]))
        return dict(zip(self._squares, (total.sqrt() / self._distributed.size).unbind(), strict=True))
