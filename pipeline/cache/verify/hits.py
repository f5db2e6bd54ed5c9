"""The teacher's hits, counted again from the stored logits and the index's labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pipeline.shards.index import NO_LABEL, ShardIndex
from schemas.cache_format import Header, Statistics

# A float16 beside numbers of finer steps may change places with them by its rounding.
_ROUNDING = 2.0**-10

Emit = Callable[[str, object, object], None]


class HitCounts:
    """Adds up over one part. A mix group counts only where none of its rows is mixed in any view of the part.

    An encoding may make ties of unequal logits, so that hits are known between two bounds: with all ties lost, and
    with all ties won. Of fp32 logits both are the same but for ties of the teacher's own.
    """

    def __init__(self, header: Header, index: ShardIndex, *, mix_group: int) -> None:
        self._has_logits = header.output("logits") is not None
        self._label_N = index.label[index.ok]
        self._group_N = np.arange(len(self._label_N)) // mix_group
        num_groups = int(self._group_N[-1]) + 1 if len(self._group_N) else 0
        self._mixes_G = np.zeros(num_groups, np.bool_)
        self._bounds_G22 = np.zeros((num_groups, 2, 2), np.int64)
        self._rows_N = np.zeros(len(self._label_N), np.int64)

    def add_view(self, mix_lambda_M: NDArray[np.float32], rows: slice) -> None:
        """Rows of a view, whatever is stored of them."""
        np.logical_or.at(self._mixes_G, self._group_N[rows], mix_lambda_M != 1)
        self._rows_N[rows] += 1

    def add_logits(self, logits_MK: NDArray[np.float32], rows: slice, *, exact: bool) -> None:
        """``exact``: stored logits are in the order of the teacher's own, but for ties."""
        label_M = self._label_N[rows]
        labelled = np.flatnonzero(label_M != NO_LABEL)
        logits_LK, label_L = logits_MK[labelled], label_M[labelled].astype(np.int64)
        own_L1 = np.take_along_axis(logits_LK, label_L[:, None], 1)
        margin_L1 = 0 if exact else _ROUNDING * np.abs(logits_LK).max(1, keepdims=True, initial=0)
        below_L = (logits_LK >= own_L1 - margin_L1).sum(1) - 1
        above_L = (logits_LK > own_L1 + margin_L1).sum(1)
        hits_L22 = np.stack([[rank_L < 1, rank_L < 5] for rank_L in (below_L, above_L)]).transpose(2, 1, 0)
        np.add.at(self._bounds_G22, self._group_N[rows][labelled], hits_L22.astype(np.int64))

    def compare(self, stated: Statistics, emit: Emit) -> None:
        """Tells each figure of a commit that the part does not bear out."""
        counted_N = (self._label_N != NO_LABEL) & ~self._mixes_G[self._group_N]
        classes: Counter[int] = Counter()
        for label, rows in zip(self._label_N[counted_N].tolist(), self._rows_N[counted_N].tolist(), strict=True):
            classes[label] += rows
        if stated.labelled != classes.total() or stated.class_counts != dict(classes):
            emit(
                "the commit's class counts are not those of the labels",
                stated.class_counts,
                dict(sorted(classes.items())),
            )
        if not self._has_logits:
            return
        bounds_22 = self._bounds_G22[~self._mixes_G].sum(0)
        for name, hits, (low, high) in zip(
            ("top-1", "top-5"), (stated.top1_hits, stated.top5_hits), bounds_22.tolist(), strict=True
        ):
            if not low <= hits <= high:
                emit(f"the commit's {name} hits are not those of the stored logits", hits, f"{low} to {high}")
