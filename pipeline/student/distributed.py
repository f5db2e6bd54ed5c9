"""The ranks that train together; a single process is rank 0 of 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional


class _SumOverRanks(torch.autograd.Function):
    """torch.distributed.nn has the same, deprecated in favour of private functions."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ARG004
        return _all_reduced(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        return _all_reduced(gradients[0])


def _all_reduced(values: Tensor) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class DistributedContext:
    """The rank of this process. With more than one, the caller has initialised torch.distributed.

    Attributes:
        preemption_notice: returns whether this rank has a notice that a node of the training will be preempted.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    preemption_notice: Callable[[], bool] = _never

    @property
    def is_main_rank(self) -> bool:
        """Whether this rank writes files and reports."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, on every rank."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def sum_with_gradient(self, values: Tensor) -> Tensor:
        """The sum over ranks for values that a loss depends on: a rank's values get the gradient of all ranks' losses.

        Every rank calls it, and backpropagates through it, as often as the others.
        """
        return _SumOverRanks.apply(values) if self.size > 1 else values

    def max(self, values: Tensor) -> Tensor:
        """The maximum over ranks, on every rank."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def join(self, values_N: Tensor) -> Tensor:
        """The values [N] of all ranks, whose lengths may differ, concatenated in rank order, on every rank."""
        if self.size == 1:
            return values_N
        start, stop, total = self._span(values_N)
        # A sum of arrays that are zero but at each rank's positions: all backends have it, for any lengths.
        joined = torch.zeros(total, dtype=values_N.dtype, device=values_N.device)
        joined[start:stop] = values_N
        return self.sum(joined)

    def join_with_gradient(self, values_ND: Tensor) -> Tensor:
        """As ``join``, for rows [N,D] that a loss depends on: a rank's rows get the gradient of all ranks' losses.

        Every rank calls it, and backpropagates through it, as often as the others.
        """
        if self.size == 1:
            return values_ND
        start, stop, total = self._span(values_ND)
        return self.sum_with_gradient(functional.pad(values_ND, (0, 0, start, total - stop)))

    def _span(self, values_N: Tensor) -> tuple[int, int, int]:
        """Where this rank's rows start and stop among those of all ranks, and their number; waits for all ranks."""
        lengths = torch.zeros(self.size, dtype=torch.int64, device=values_N.device)
        lengths[self.rank] = len(values_N)
        ends = self.sum(lengths).cumsum(0).tolist()
        return ends[self.rank] - len(values_N), ends[self.rank], ends[-1]

    def copy_from_main_rank(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites these tensors, in place, with those of rank 0."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def preemption_pending(self) -> bool:
        """Whether ``preemption_notice`` is true on any rank; the same on every rank."""
        return bool(self.max(torch.tensor(self.preemption_notice(), dtype=torch.uint8, device=self.device)))

    def wait(self) -> None:
        """Waits until every rank calls it."""
        if self.size > 1:
            dist.barrier()
