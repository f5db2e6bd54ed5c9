"""What a part says about itself: teacher accuracy, and how faithful the stored numbers are to the fp32 ones."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.augment.params import sample_keys
from pipeline.cache.build.encoding_fidelity import cosine_sum, kl_sum, pearson_sum
from pipeline.cache.build.ranking import class_ranks, predicted_classes
from pipeline.cache.format.codec import decode, encode
from pipeline.teacher.inference import InferenceOutputs
from pipeline.teacher.rendering import GroupViews
from schemas.cache_format import Header, Output, Statistics

TEMPERATURES = (1.0, 2.0, 4.0)
_SAMPLE_ONE_IN = 64
_COUNTS = ("labelled", "top1_hits", "top5_hits", "fidelity_rows", "argmax_flips")


class StatisticsSum:
    """Adds up over the views and groups of one part."""

    def __init__(self, header: Header) -> None:
        self._logits, self._embedding = header.output("logits"), header.output("embedding")
        self._labelled = self._top1 = self._top5 = self._rows = self._flips = 0
        self._classes: Counter[int] = Counter()
        self._kl, self._pearson = dict.fromkeys(TEMPERATURES, 0.0), dict.fromkeys(TEMPERATURES, 0.0)
        self._cosine = 0.0

    def add(self, group: GroupViews, answers: InferenceOutputs) -> None:
        """Counts one view of one group; hits only where images are not mixed."""
        if not group.mixes:
            self._count_hits(answers.logits_NK, group.label_N)
        self._measure_fidelity(group, answers)

    def _count_hits(self, logits_NK: NDArray[np.float32], label_N: NDArray[np.int32]) -> None:
        labelled = label_N >= 0
        logits_MK, label_M = logits_NK[labelled], label_N[labelled]
        rank_M = class_ranks(logits_MK, label_M)
        self._labelled += len(label_M)
        self._top1 += int((rank_M < 1).sum())
        self._top5 += int((rank_M < 5).sum())
        self._classes.update(label_M.tolist())

    def _measure_fidelity(self, group: GroupViews, answers: InferenceOutputs) -> None:
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
        self._flips += int((predicted_classes(exact_NK) != predicted_classes(decode(column, output))).sum())
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


class StatisticsFold:
    """The sums of all parts, added in the order given; keeps 56 bytes of each."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._classes: Counter[int] = Counter()
        self._kl, self._pearson = (
            {str(temperature): array("d") for temperature in TEMPERATURES} for _ in ("kl", "pearson")
        )
        self._cosine = array("d")

    def add(self, part: Statistics) -> None:
        for name in _COUNTS:
            self._counts[name] += getattr(part, name)
        self._classes.update(part.class_counts)
        for sums, own in ((self._kl, part.kl_sum), (self._pearson, part.pearson_sum)):
            for temperature, values in sums.items():
                values.append(own.get(temperature, 0.0))
        self._cosine.append(part.embedding_cosine_sum)

    def result(self) -> Statistics:
        # Not added as they come: from 3.12 on Python's sum compensates for rounding, and a loop does not.
        return Statistics(
            **{name: self._counts[name] for name in _COUNTS},
            class_counts=dict(sorted(self._classes.items())),
            kl_sum={temperature: _total(values) for temperature, values in self._kl.items()},
            pearson_sum={temperature: _total(values) for temperature, values in self._pearson.items()},
            embedding_cosine_sum=_total(self._cosine),
        )


def _total(values: Sequence[float]) -> float:
    return float(sum(values))


def merge_statistics(parts: Iterable[Statistics]) -> Statistics:
    """``StatisticsFold`` over all of these."""
    fold = StatisticsFold()
    for part in parts:
        fold.add(part)
    return fold.result()
