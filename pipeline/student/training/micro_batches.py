"""Micro-batches: the rows of one rank in one step, split for gradient accumulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from pipeline.student.data.batch import Batch


def num_micro_batches(accumulate: int, num_rows_global: int, global_batch_size: int) -> int:
    """For a step with that many rows over all ranks; the same on each, since losses may sum over ranks in each one.

    A short step has proportionally fewer, so that no micro-batch is much smaller than those of a full step.
    """
    return -(-accumulate * num_rows_global // global_batch_size)


def split_rows(num_rows: int, num_chunks: int, *, rows_per_unit: int) -> list[slice]:
    """Contiguous runs of whole units, which differ by one unit at most; only the last unit may be incomplete.

    Args:
        rows_per_unit: rows that belong together: 2 under mixing, else 1. Views of an image may be in two micro-batches.
    """
    num_units = -(-num_rows // rows_per_unit)
    bounds = [min(chunk * num_units // num_chunks * rows_per_unit, num_rows) for chunk in range(num_chunks + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def smallest_micro_batch(num_rows: int, num_chunks: int, *, rows_per_unit: int) -> int:
    """Rows of the smallest chunk."""
    return min(chunk.stop - chunk.start for chunk in split_rows(num_rows, num_chunks, rows_per_unit=rows_per_unit))


def micro_batches(batch: Batch, num_chunks: int) -> list[Batch]:
    """Splits a batch and keeps mixup partners together; ``num_rows_global`` stays that of the step."""
    if num_chunks == 1:
        return [batch]
    # Partners are at positions 2j and 2j + 1, see TrainingOrder.
    rows_per_unit = 1 if batch.partner_B is None else 2
    return [_chunk(batch, rows) for rows in split_rows(batch.num_rows, num_chunks, rows_per_unit=rows_per_unit)]


def _chunk(batch: Batch, rows: slice) -> Batch:
    chunk = batch.map_columns(lambda column: column[rows])
    # Positions in the batch become positions in the micro-batch.
    partner_B = None if chunk.partner_B is None else chunk.partner_B - rows.start
    return replace(chunk, sample_ids=batch.sample_ids[rows], partner_B=partner_B)


def combined(
    losses: Sequence[tuple[Tensor, Mapping[str, Tensor]]], num_rows: Sequence[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the micro-batches' totals, which are weighted already, and the mean of each term, weighted by rows."""
    shares = [rows / sum(num_rows) for rows in num_rows]
    terms = {
        name: torch.stack([share * values[name] for share, (_, values) in zip(shares, losses, strict=True)]).sum()
        for name in losses[0][1]
    }
    return torch.stack([total for total, _ in losses]).sum(), terms
