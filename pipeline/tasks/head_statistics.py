"""Statistics of a teacher with several heads: sums of each head, and their recount from stored outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.tasks.classification import LABEL, LOGITS, NO_LABEL, HitCounter, HitRecount
from pipeline.tasks.head_targets import Head
from pipeline.tasks.task import (
    Recount,
    StatisticsAccumulator,
    Targets,
    TeacherOutputs,
)
from schemas.cache_format import Statistics

DECISION_SUMS = ("true_positives", "false_positives")
# Two encodings of a row with 16 or 256 levels move a logit by at most half a step of its range.
_HALF_STEP = 1 / 30
_ROUNDING = 2.0**-10


class HeadSums(StatisticsAccumulator):
    """``HEAD/NAME`` in ``Statistics.sums``: the counts of classification for each class head; for a multilabel head its
    labelled rows, its labels by class, and its right and wrong positive decisions (logit above 0)."""

    def __init__(self, heads: tuple[Head, ...]) -> None:
        self._heads, self._sums = heads, Counter[str]()

    def add(self, outputs: TeacherOutputs, targets: Targets) -> None:
        for head in self._heads:
            if head.output in outputs:
                counts = _decisions if head.is_multilabel else _hits
                self._sums.update({f"{head.name}/{key}": n for key, n in counts(head, outputs, targets).items()})

    def add_part(self, statistics: Statistics) -> None:
        self._sums.update({key: int(value) for key, value in statistics.sums.items()})

    def result(self) -> dict[str, Any]:
        return {"sums": {key: float(self._sums[key]) for key in sorted(self._sums)}}


def _hits(head: Head, outputs: TeacherOutputs, targets: Targets) -> dict[str, int]:
    counter = HitCounter()
    counter.add({LOGITS: outputs[head.output]}, {LABEL: targets[head.column]})
    counts = counter.result()
    classes = counts.pop("class_counts")
    return counts | {f"classes/{label}": num_rows for label, num_rows in classes.items()}


def _decisions(head: Head, outputs: TeacherOutputs, targets: Targets) -> dict[str, int]:
    labelled_N = head.target_column.has_target(targets[head.column])
    is_set_MK, is_positive_MK = targets[head.column][labelled_N] == 1, outputs[head.output][labelled_N] > 0
    return _label_counts(is_set_MK, np.ones(len(is_set_MK), np.int64)) | {
        "true_positives": int((is_set_MK & is_positive_MK).sum()),
        "false_positives": int((~is_set_MK & is_positive_MK).sum()),
    }


def _label_counts(is_set_MK: NDArray[np.bool_], num_rows_M: NDArray[np.int64]) -> dict[str, int]:
    counts_K = (is_set_MK * num_rows_M[:, None]).sum(0).tolist()
    return {"labelled": int(num_rows_M.sum())} | {f"classes/{label}": n for label, n in enumerate(counts_K) if n}


class DecisionRecount:
    """As ``HitRecount``, for a multilabel head: a mix group counts only if none of its rows is mixed."""

    def __init__(self, target_NK: NDArray[np.int8], *, mix_group: int, has_logits: bool) -> None:
        self._target_NK, self._has_logits = target_NK, has_logits
        self._group_N = np.arange(len(target_NK)) // mix_group
        num_groups = int(self._group_N[-1]) + 1 if len(self._group_N) else 0
        self._mixes_G = np.zeros(num_groups, np.bool_)
        # [G, true or false positives, all doubtful decisions negative or positive]
        self._counts_G22 = np.zeros((num_groups, 2, 2), np.int64)
        self._num_rows_N = np.zeros(len(target_NK), np.int64)

    def add_view(self, mix_lambda_M: NDArray[np.float32], rows: slice) -> None:
        np.logical_or.at(self._mixes_G, self._group_N[rows], mix_lambda_M != 1)
        self._num_rows_N[rows] += 1

    def add_logits(self, values: NDArray[np.float32], rows: slice, *, exact: bool) -> None:
        target_MK = self._target_NK[rows]
        labelled = np.flatnonzero(target_MK[:, 0] != NO_LABEL)
        logits_LK, is_set_LK = values[labelled], target_MK[labelled] == 1
        range_L1 = np.ptp(logits_LK, axis=1, keepdims=True) if len(labelled) else np.zeros((0, 1), np.float32)
        margin_L1 = (
            0 if exact else _HALF_STEP * range_L1 + _ROUNDING * np.abs(logits_LK).max(1, keepdims=True, initial=0)
        )
        # A small logit of either sign may be stored as 0.
        for bound, is_positive_LK in enumerate((logits_LK > margin_L1, logits_LK >= -margin_L1)):
            counts_L2 = np.stack([(is_set_LK & is_positive_LK).sum(1), (~is_set_LK & is_positive_LK).sum(1)], 1)
            np.add.at(self._counts_G22[:, :, bound], self._group_N[rows][labelled], counts_L2)

    def compare(self, name: str, stated: Mapping[str, int], expect: Callable[[str, object, object], object]) -> None:
        counted_N = (self._target_NK[:, 0] != NO_LABEL) & ~self._mixes_G[self._group_N]
        expected = _label_counts(self._target_NK[counted_N] == 1, self._num_rows_N[counted_N])
        got = {key: n for key, n in stated.items() if key not in DECISION_SUMS}
        expect(f"the commit's class counts of the head {name} do not match the labels", got, expected)
        if self._has_logits:
            bounds_22 = self._counts_G22[~self._mixes_G].sum(0).tolist()
            for key, (low, high) in zip(DECISION_SUMS, bounds_22, strict=True):
                count = stated.get(key, 0)
                nearest = min(max(count, low), high)
                expect(f"the commit's {key} of the head {name} do not match the stored logits", count, nearest)


class HeadsRecount(Recount):
    """The recounts of all heads whose logits the teacher has."""

    def __init__(self, heads: tuple[Head, ...], targets: Targets, *, mix_group: int, outputs: Iterable[str]) -> None:
        stored = set(outputs)
        self._hits: dict[str, tuple[Head, HitRecount]] = {}
        self._decisions: dict[str, tuple[Head, DecisionRecount]] = {}
        for head in heads:
            has_logits = head.output in stored
            if head.is_multilabel:
                counts = DecisionRecount(targets[head.column], mix_group=mix_group, has_logits=has_logits)
                self._decisions[head.output] = head, counts
            else:
                hits = HitRecount(targets[head.column], mix_group=mix_group, has_logits=has_logits)
                self._hits[head.output] = head, hits

    def add_view(self, mix_lambda_M: NDArray[np.float32], rows: slice) -> None:
        for _, recount in (*self._hits.values(), *self._decisions.values()):
            recount.add_view(mix_lambda_M, rows)

    def add_outputs(self, name: str, values: NDArray[np.float32], rows: slice, *, exact: bool) -> None:
        if name in self._hits:
            self._hits[name][1].add_outputs(LOGITS, values, rows, exact=exact)
        if name in self._decisions:
            self._decisions[name][1].add_logits(values, rows, exact=exact)

    def compare(self, stated: Statistics, expect: Callable[[str, object, object], object]) -> None:
        for head, hits in self._hits.values():
            if sums := sums_of(head, stated):
                hits.compare(_as_classification(sums), _of_head(head, expect))
        for head, decisions in self._decisions.values():
            if sums := sums_of(head, stated):
                decisions.compare(head.name, sums, expect)


def sums_of(head: Head, statistics: Statistics) -> dict[str, int]:
    prefix = f"{head.name}/"
    return {key.removeprefix(prefix): int(n) for key, n in statistics.sums.items() if key.startswith(prefix)}


def _as_classification(sums: Mapping[str, int]) -> Statistics:
    classes = {int(key.removeprefix("classes/")): n for key, n in sums.items() if key.startswith("classes/")}
    labelled, top1_hits, top5_hits = (sums.get(key, 0) for key in ("labelled", "top1_hits", "top5_hits"))
    class_counts = dict(sorted(classes.items()))
    return Statistics(labelled=labelled, top1_hits=top1_hits, top5_hits=top5_hits, class_counts=class_counts)


def _of_head(head: Head, expect: Callable[[str, object, object], object]) -> Callable[[str, object, object], object]:
    return lambda what, got, expected: expect(f"head {head.name}: {what}", got, expected)
