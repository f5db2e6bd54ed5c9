"""Statistics of a part and of a cache: teacher accuracy, and the fidelity of stored outputs to the fp32 ones."""

from __future__ import annotations

from array import array
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from pipeline.augment.params import sample_keys
from pipeline.cache.format.codec import decode, encode
from pipeline.tasks.classification import class_ranks, predicted_classes
from pipeline.teacher.inference import InferenceOutputs
from pipeline.teacher.rendering import GroupViews
from schemas.cache_format import Header, Output, Statistics

_KEYS = {str(temperature): temperature for temperature in (1.0, 2.0, 4.0)}
_SAMPLE_ONE_IN = 64
_COUNTS = ("labelled", "top1_hits", "top5_hits", "fidelity_rows", "argmax_flips")


class StatisticsSum:
    """Sums over the views and groups of one part."""

    def __init__(self, header: Header) -> None:
        self._logits, self._embedding = header.output("logits"), header.output("embedding")
        self._counts: Counter[str] = Counter()
        self._classes: Counter[int] = Counter()
        self._kl, self._pearson = dict.fromkeys(_KEYS, 0.0), dict.fromkeys(_KEYS, 0.0)
        self._cosine = 0.0

    def add(self, group: GroupViews, outputs: InferenceOutputs) -> None:
        """Adds one view of one group. Hits are counted only if its images are not mixed."""
        if not group.mixes:
            self._count_hits(outputs.logits_NK, group.label_N)
        self._measure_fidelity(group, outputs)

    def _count_hits(self, logits_NK: NDArray[np.float32], label_N: NDArray[np.int32]) -> None:
        labelled = label_N >= 0
        logits_MK, label_M = logits_NK[labelled], label_N[labelled]
        rank_M = class_ranks(logits_MK, label_M)
        self._counts["labelled"] += len(label_M)
        self._counts["top1_hits"] += int((rank_M < 1).sum())
        self._counts["top5_hits"] += int((rank_M < 5).sum())
        self._classes.update(label_M.tolist())

    def _measure_fidelity(self, group: GroupViews, outputs: InferenceOutputs) -> None:
        # Keyed by the sample, so that the same rows are measured for any order of work.
        chosen = sample_keys(0, group.sample_ids)[:, 0] % np.uint64(_SAMPLE_ONE_IN) == 0
        if not chosen.any():
            return
        self._counts["fidelity_rows"] += int(chosen.sum())
        if self._logits is not None:
            self._measure_logits(outputs.logits_NK[chosen], self._logits)
        if self._embedding is not None:
            exact = outputs.embedding_ND[chosen]
            self._cosine += cosine_sum(exact, decode(encode(exact, self._embedding), self._embedding))

    def _measure_logits(self, exact_NK: NDArray[np.float32], output: Output) -> None:
        column = encode(exact_NK, output)
        flips_N = predicted_classes(exact_NK) != predicted_classes(decode(column, output))
        self._counts["argmax_flips"] += int(flips_N.sum())
        for key, temperature in _KEYS.items():
            stored_NK = decode(column, output, temperature=temperature)
            self._kl[key] += kl_sum(exact_NK, stored_NK, temperature)
            self._pearson[key] += pearson_sum(exact_NK, stored_NK, temperature)

    def result(self) -> Statistics:
        return Statistics(
            **self._counts,
            class_counts=dict(sorted(self._classes.items())),
            kl_sum=self._kl,
            pearson_sum=self._pearson,
            embedding_cosine_sum=self._cosine,
        )


class StatisticsFold:
    """The sums of all parts, added in the given order, in 56 bytes a part."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._classes: Counter[int] = Counter()
        self._kl, self._pearson = ({key: array("d") for key in _KEYS} for _ in range(2))
        self._cosine = array("d")

    def add(self, part: Statistics) -> None:
        for name in _COUNTS:
            self._counts[name] += getattr(part, name)
        self._classes.update(part.class_counts)
        for sums, of_part in ((self._kl, part.kl_sum), (self._pearson, part.pearson_sum)):
            for key, values in sums.items():
                values.append(of_part.get(key, 0.0))
        self._cosine.append(part.embedding_cosine_sum)

    def result(self) -> Statistics:
        # Not a running sum: Python's ``sum`` compensates for rounding from 3.12 on.
        return Statistics(
            **{name: self._counts[name] for name in _COUNTS},
            class_counts=dict(sorted(self._classes.items())),
            kl_sum={key: float(sum(values)) for key, values in self._kl.items()},
            pearson_sum={key: float(sum(values)) for key, values in self._pearson.items()},
            embedding_cosine_sum=float(sum(self._cosine)),
        )


def kl_sum(exact_NK: NDArray[np.float32], stored_NK: NDArray[np.float32], temperature: float) -> float:
    """Nats: KL divergence of the softmax at T of the stored logits from that of the exact logits, summed over rows."""
    log_p, log_q = (_log_softmax(values, temperature) for values in (exact_NK, stored_NK))
    return float((np.exp(log_p) * (log_p - log_q)).sum())


def pearson_sum(exact_NK: NDArray[np.float32], stored_NK: NDArray[np.float32], temperature: float) -> float:
    """1 − Pearson correlation of the probabilities of a row at T (DIST's relation within a row, Huang 2022), summed."""
    p, q = (np.exp(_log_softmax(values, temperature)) for values in (exact_NK, stored_NK))
    return float((1 - _cosines(p - p.mean(1, keepdims=True), q - q.mean(1, keepdims=True))).sum())


def cosine_sum(exact_ND: NDArray[np.float32], stored_ND: NDArray[np.float32]) -> float:
    return float(_cosines(exact_ND.astype(np.float64), stored_ND.astype(np.float64)).sum())


def _cosines(left_ND: NDArray[np.float64], right_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N]; 1 for two zero vectors, 0 for one."""
    norms = np.linalg.norm(left_ND, axis=1) * np.linalg.norm(right_ND, axis=1)
    same_N = (left_ND == right_ND).all(1)
    return np.where(same_N, 1.0, (left_ND * right_ND).sum(1) / np.where(norms > 0, norms, 1.0))


def _log_softmax(values_NK: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    scaled = values_NK.astype(np.float64) / temperature
    scaled -= scaled.max(1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
