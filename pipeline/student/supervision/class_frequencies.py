"""How often each class occurs among the training rows: counts, priors for logit adjustment, and weights of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.errors import ConfigError
from pipeline.student.data.batch import Batch
from pipeline.student.data.sources import RowSource
from pipeline.tasks import Task, TaskHead
from schemas.config import BalanceConfig


def label_counts(source: RowSource, *, shards: Sequence[int] | None = None) -> NDArray[np.int64]:
    """How many ok rows of all shards, or of these, have each class; reads their indexes. int64 [K]."""
    counts = np.zeros(source.task.num_classes, np.int64)
    for shard in range(len(source.shard_ids)) if shards is None else shards:
        _, class_M = source.task.class_ids(source.targets(shard))
        counts += np.bincount(class_M, minlength=len(counts))
    return counts


def counts_by_head(
    source: RowSource, heads: Sequence[TaskHead], *, shards: Sequence[int] | None = None
) -> dict[str, NDArray[np.int64]]:
    """``label_counts`` of each of these class heads, [K] by the column of the classes."""
    if not heads:
        return {}
    count_K = label_counts(source, shards=shards)
    return {head.column: count_K[source.task.class_range(head)] for head in heads}


def log_prior(count_K: NDArray[np.int64], device: torch.device) -> Tensor:
    """Logarithms of the classes' shares of the labels, fp32 [K].

    A class without a row counts as half a row, so that its logarithm is finite.
    """
    counts = np.maximum(count_K, 0.5)
    return torch.from_numpy(np.log(counts / counts.sum())).float().to(device)


@dataclass(frozen=True, slots=True)
class RowWeights:
    """Factors of rows in the gradients, by the class of one head.

    Attributes:
        column: of the labels.
        weight_K: fp32 [K + 1]; the last is that of rows without a label, 1.
        num_clipped: rows whose weight was clipped to ``[1 / max_weight, max_weight]``, of ``num_labelled``.
    """

    column: str
    weight_K: Tensor
    max_weight: float
    num_clipped: int
    num_labelled: int

    @classmethod
    def of(cls, balance: BalanceConfig, column: str, count_K: NDArray[np.int64], device: torch.device) -> RowWeights:
        """
        Args:
            count_K: how many training rows each class of the column has.
        """
        weight_K, num_clipped = class_weights(count_K, power=balance.power, max_weight=balance.max_weight)
        weights = torch.from_numpy(np.append(weight_K, 1.0)).float()
        return cls(column, weights.to(device), balance.max_weight, num_clipped, int(count_K.sum()))

    def of_rows(self, batch: Batch) -> Tensor:
        """[B]; of a mixed row, the mean of the weights of both images with their shares."""
        weight_B = self.weight_K[batch.targets[self.column]]
        if batch.partner_B is None or batch.lambda_B is None:
            return weight_B
        return weight_B[batch.partner_B].lerp(weight_B, batch.lambda_B)

    def warning(self) -> str:
        """What the weights are, in one line."""
        low, high = self.weight_K[:-1].min().item(), self.weight_K[:-1].max().item()
        text = f"train.balance: rows have weights of {low:.3g} to {high:.3g} by their {self.column}"
        if not self.num_clipped:
            return text
        bounds = f"[{1 / self.max_weight:.3g}, {self.max_weight:g}] (max_weight)"
        return f"{text}; those of {self.num_clipped} of {self.num_labelled} rows are clipped to {bounds}"


def balanced_head(balance: BalanceConfig, task: Task) -> TaskHead:
    """The head whose classes determine the weights of rows.

    Raises:
        ConfigError: the task does not have this class head.
    """
    heads = [head for head in task.heads if head.kind == "class"]
    chosen = [head for head in heads if head.name == balance.head]
    if not chosen:
        raise ConfigError(
            "the weights of rows follow a head that the data do not have",
            code="config.balance-head",
            where="train.balance.head",
            got=balance.head,
            expected=", ".join(str(head.name) for head in heads) or "a task with labels of one class a row",
        )
    return chosen[0]


def class_weights(count_K: NDArray[np.int64], *, power: float, max_weight: float) -> tuple[NDArray[np.float64], int]:
    """The weight of a row by its class: ``n^-power`` with mean 1 over the rows, clipped to ``max_weight`` and its
    inverse; 1 for a class without rows. And the number of rows whose weight was clipped."""
    occurs_K = count_K > 0
    weight_K = np.ones(len(count_K))
    weight_K[occurs_K] = count_K[occurs_K] ** -power
    if occurs_K.any():
        weight_K[occurs_K] *= count_K.sum() / (weight_K * count_K).sum()
    clipped_K = np.clip(weight_K, 1 / max_weight, max_weight)
    return clipped_K, int(count_K[clipped_K != weight_K].sum())
