"""Recounts the teacher's hits from the stored logits and the labels of the index."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pipeline.shards.index import NO_LABEL, ShardIndex
from schemas.cache_format import Header, Statistics

# float16 rounding may swap the order of a stored float16 logit and a logit stored in finer steps.
_ROUNDING = 2.0**-10

Report = Callable[[str, object, object], None]
"""Takes what is wrong, got and expected."""


class HitCounts:
    """Counts of one part. A mix group counts only if none of its rows is mixed in any view of the part.

    An encoding may turn unequal logits into ties. So hits have two bounds: with all ties lost, and with all ties won.
    For fp32 logits the bounds are equal unless the teacher's own logits tie.
    """

    def __init__(self, header: Header, index: ShardIndex, *, mix_group: int) -> None:
        self._has_logits = header.output("logits") is not None
        self._label_N = index.label[index.ok]
        self._group_N = np.arange(len(self._label_N)) // mix_group
        num_groups = int(self._group_N[-1]) + 1 if len(self._group_N) else 0
        self._mixes_G = np.zeros(num_groups, np.bool_)
        # [G, top-1 or top-5, ties lost or won]
        self._hits_G22 = np.zeros((num_groups, 2, 2), np.int64)
        self._num_rows_N = np.zeros(len(self._label_N), np.int64)

    def add_view(self, mix_lambda_M: NDArray[np.float32], rows: slice) -> None:
        """Adds rows of a view, with or without finite logits."""
        np.logical_or.at(self._mixes_G, self._group_N[rows], mix_lambda_M != 1)
        self._num_rows_N[rows] += 1

    def add_logits(self, logits_MK: NDArray[np.float32], rows: slice, *, exact: bool) -> None:
        """``exact``: the order of the stored logits is that of the teacher's fp32 logits, except for ties."""
        label_M = self._label_N[rows]
        labelled = np.flatnonzero(label_M != NO_LABEL)
        logits_LK, label_L = logits_MK[labelled], label_M[labelled].astype(np.int64)
        label_logit_L1 = np.take_along_axis(logits_LK, label_L[:, None], 1)
        margin_L1 = 0 if exact else _ROUNDING * np.abs(logits_LK).max(1, keepdims=True, initial=0)
        max_rank_L = (logits_LK >= label_logit_L1 - margin_L1).sum(1) - 1
        min_rank_L = (logits_LK > label_logit_L1 + margin_L1).sum(1)
        hits_L22 = np.stack([[rank_L < 1, rank_L < 5] for rank_L in (max_rank_L, min_rank_L)]).transpose(2, 1, 0)
        np.add.at(self._hits_G22, self._group_N[rows][labelled], hits_L22.astype(np.int64))

    def compare(self, stated: Statistics, report: Report) -> None:
        """Reports each figure of a commit that does not match the part."""
        counted_N = (self._label_N != NO_LABEL) & ~self._mixes_G[self._group_N]
        classes: Counter[int] = Counter()
        for label, num_rows in zip(
            self._label_N[counted_N].tolist(), self._num_rows_N[counted_N].tolist(), strict=True
        ):
            classes[label] += num_rows
        if stated.labelled != classes.total() or stated.class_counts != dict(classes):
            expected = dict(sorted(classes.items()))
            report("the commit's class counts do not match the labels", stated.class_counts, expected)
        if not self._has_logits:
            return
        bounds_22 = self._hits_G22[~self._mixes_G].sum(0).tolist()
        for name, hits, (low, high) in zip(
            ("top-1", "top-5"), (stated.top1_hits, stated.top5_hits), bounds_22, strict=True
        ):
            if not low <= hits <= high:
                report(f"the commit's {name} hits do not match the stored logits", hits, f"{low} to {high}")
