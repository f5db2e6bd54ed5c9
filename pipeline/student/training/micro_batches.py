"""Micro-batches: one rank's rows of a step, cut so that each piece can be learnt from by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from pipeline.student.data.dataset import Batch


def num_pieces(accumulate: int, num_rows_global: int, global_batch_size: int) -> int:
    """Of a step with that many rows over all ranks; the same on each, since losses may ask all ranks in each piece.

    A short step has proportionally fewer, so that no piece is much smaller than those of a full one.
    """
    return -(-accumulate * num_rows_global // global_batch_size)


def cuts(num_rows: int, pieces: int, *, rows_per_unit: int) -> list[slice]:
    """Neighbouring runs of whole units, which differ by one unit at most; only the very last unit may be incomplete."""
    num_units = -(-num_rows // rows_per_unit)
    bounds = [min(piece * num_units // pieces * rows_per_unit, num_rows) for piece in range(pieces + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def smallest_batch(num_rows: int, pieces: int, *, rows_per_unit: int) -> int:
    """Rows of the smallest piece."""
    return min(piece.stop - piece.start for piece in cuts(num_rows, pieces, rows_per_unit=rows_per_unit))


def micro_batches(batch: Batch, pieces: int) -> list[Batch]:
    """The batch in so many pieces, mates of a mixed pair in the same one; ``num_rows_global`` stays the step's."""
    if pieces == 1:
        return [batch]
    # Mates stand at 2j and 2j + 1, see TrainingOrder.
    rows_per_unit = 1 if batch.partner_B is None else 2
    return [_piece(batch, rows) for rows in cuts(len(batch.labels_B), pieces, rows_per_unit=rows_per_unit)]


def _piece(batch: Batch, rows: slice) -> Batch:
    piece = batch.map_columns(lambda column: column[rows])
    # Positions in the batch become positions in the piece.
    partner_B = None if piece.partner_B is None else piece.partner_B - rows.start
    return replace(piece, sample_ids=batch.sample_ids[rows], partner_B=partner_B)


def combined(
    learnt: Sequence[tuple[Tensor, Mapping[str, Tensor]]], num_rows: Sequence[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the pieces' totals, which have their shares in them; and of each term the mean, weighted by rows."""
    shares = [rows / sum(num_rows) for rows in num_rows]
    terms = {
        name: torch.stack([share * values[name] for share, (_, values) in zip(shares, learnt, strict=True)]).sum()
        for name in learnt[0][1]
    }
    return torch.stack([total for total, _ in learnt]).sum(), terms
