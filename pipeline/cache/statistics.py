"""What a part says about itself: teacher accuracy, and how faithful the stored numbers are to the fp32 ones."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codec import decode, encode
from pipeline.cache.fidelity import cosine_sum, kl_sum, pearson_sum
from pipeline.teacher.groups import GroupViews
from pipeline.teacher.infer import Answers
from pipeline.views.params import sample_keys
from schemas.manifest import Header, Output, Statistics

TEMPERATURES = (1.0, 2.0, 4.0)
_SAMPLE_ONE_IN = 64


class StatisticsSum:
    """Adds up over the views and groups of one part."""

    def __init__(self, header: Header) -> None:
        self._logits, self._embedding = header.output("logits"), header.output("embedding")
        self._labelled = self._top1 = self._top5 = self._rows = self._flips = 0
        self._classes: Counter[int] = Counter()
        self._kl, self._pearson = dict.fromkeys(TEMPERATURES, 0.0), dict.fromkeys(TEMPERATURES, 0.0)
        self._cosine = 0.0

    def add(self, group: GroupViews, answers: Answers) -> None:
        """Counts one view of one group; hits only where images are not mixed."""
        if not group.mixes:
            self._count_hits(answers.logits_NK, group.label_N)
        self._measure_fidelity(group, answers)

    def _count_hits(self, logits_NK: NDArray[np.float32], label_N: NDArray[np.int32]) -> None:
        labelled = label_N >= 0
        logits_MK, label_M = logits_NK[labelled], label_N[labelled]
        rank_M = (logits_MK > np.take_along_axis(logits_MK, label_M[:, None].astype(np.int64), 1)).sum(1)
        self._labelled += len(label_M)
        self._top1 += int((rank_M < 1).sum())
        self._top5 += int((rank_M < 5).sum())
        self._classes.update(label_M.tolist())

    def _measure_fidelity(self, group: GroupViews, answers: Answers) -> None:
        # Keyed by the sample, so that the same rows are measured whatever the order of work.
        chosen = sample_keys(0, group.sample_ids)[:, 0] % np.uint64(_SAMPLE_ONE_IN) == 0
        if not chosen.any():
            return
        self._rows += int(chosen.sum())
        if self._logits is not None:
            self._measure_logits(answers.logits_NK[chosen], self._logits)
        if self._embedding is not None:
            exact = answers.embedding_ND[chosen]
            self._cosine += cosine_sum(exact, decode(encode(exact, self._embedding), self._embedding))

    def _measure_logits(self, exact_NK: NDArray[np.float32], output: Output) -> None:
        column = encode(exact_NK, output)
        self._flips += int((exact_NK.argmax(1) != decode(column, output).argmax(1)).sum())
        for temperature in TEMPERATURES:
            stored_NK = decode(column, output, temperature=temperature)
            self._kl[temperature] += kl_sum(exact_NK, stored_NK, temperature)
            self._pearson[temperature] += pearson_sum(exact_NK, stored_NK, temperature)

    def result(self) -> Statistics:
        return Statistics(
            labelled=self._labelled,
            top1_hits=self._top1,
            top5_hits=self._top5,
            class_counts=dict(sorted(self._classes.items())),
            fidelity_rows=self._rows,
            kl_sum={str(temperature): value for temperature, value in self._kl.items()},
            pearson_sum={str(temperature): value for temperature, value in self._pearson.items()},
            argmax_flips=self._flips,
            embedding_cosine_sum=self._cosine,
        )


def merge_statistics(parts: list[Statistics]) -> Statistics:
    """The sums of all parts, added in the order given."""
    classes: Counter[int] = Counter()
    for part in parts:
        classes.update(part.class_counts)
    return Statistics(
        labelled=sum(part.labelled for part in parts),
        top1_hits=sum(part.top1_hits for part in parts),
        top5_hits=sum(part.top5_hits for part in parts),
        class_counts=dict(sorted(classes.items())),
        fidelity_rows=sum(part.fidelity_rows for part in parts),
        kl_sum=_sum_by_temperature([part.kl_sum for part in parts]),
        pearson_sum=_sum_by_temperature([part.pearson_sum for part in parts]),
        argmax_flips=sum(part.argmax_flips for part in parts),
        embedding_cosine_sum=sum(part.embedding_cosine_sum for part in parts),
    )


def _sum_by_temperature(parts: list[dict[str, float]]) -> dict[str, float]:
    return {str(t): sum(part.get(str(t), 0.0) for part in parts) for t in TEMPERATURES}
