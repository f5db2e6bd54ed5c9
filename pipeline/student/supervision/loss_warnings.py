"""What speaks against the losses of a run on its data, told at its start with numbers and what to do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.models import random_weights_warnings
from pipeline.student.data.sources import RowSource, label_counts
from pipeline.student.supervision.spec import SupervisionSpec
from schemas.config import Config, DistLoss

# Where long-tailed benchmarks begin.
_STRONG_IMBALANCE = 10
# A few rare classes among many are no reason to speak.
_MANY_ABSENT = 0.1
_SHARDS_LOOKED_AT = 16


def advice(config: Config, facts: SupervisionSpec, source: RowSource, *, world_size: int) -> list[str]:
    """One line each. Only DIST is known to suffer from what labels show, so without it no label is read."""
    told = random_weights_warnings(config.teacher.models) if config.teacher.mode != "none" else []
    terms = [term for term in config.loss if isinstance(term, DistLoss) and term.weight]
    if not terms:
        return told
    told += _few_classes(facts.num_classes)
    share_K = _label_shares(facts, source)
    if share_K is not None:
        told += _imbalance(share_K)
        intra = [term for term in terms if term.intra_weight]
        if intra:
            gathers = world_size == 1 or all(term.gather for term in intra)
            rows = config.train.global_batch_size // (1 if gathers else world_size)
            told += _absent_classes(share_K, rows, may_gather=not gathers)
    return told


def _few_classes(num_classes: int) -> list[str]:
    if num_classes > 2:
        return []
    return [
        "dist with K = 2: 1 - correlation of two probabilities is 0 or 2, so inter says no more than which class wins; "
        "use kd, or raise the temperature and set inter_weight: 0"
    ]


def _imbalance(share_K: NDArray[np.float64]) -> list[str]:
    occurring = share_K[share_K > 0]
    ratio = occurring.max() / occurring.min()
    if ratio < _STRONG_IMBALANCE:
        return []
    return [
        f"dist on imbalanced classes: the most frequent has {occurring.max():.2%} of the labels, the rarest "
        f"{occurring.min():.2%}, a ratio of {ratio:.0f}; DIST was seen below plain KD on such data: compare with kd"
    ]


def _absent_classes(share_K: NDArray[np.float64], rows: int, *, may_gather: bool) -> list[str]:
    """Of rows drawn by these shares; the order's batches are close to that."""
    absent = float(((1 - share_K) ** rows > 0.5).mean())
    if absent <= _MANY_ABSENT:
        return []
    gather = "set gather: true, " if may_gather else ""
    return [
        f"dist in batches of {rows} rows: {absent:.0%} of the {len(share_K)} classes are absent from most of them, and "
        f"intra relations of an absent class are noise; {gather}raise train.global_batch_size, or lower intra_weight"
    ]


def _label_shares(facts: SupervisionSpec, source: RowSource) -> NDArray[np.float64] | None:
    """[K], from the cache's statistics, or from the indexes of a few shards; None where no label is seen.

    A cache counts labels where it counts hits: on views that are not mixed.
    """
    if facts.data.label is None:
        return None
    count_K = np.zeros(facts.num_classes, np.int64)
    stored = facts.caches[0].manifest.statistics.class_counts if facts.caches else {}
    if stored:
        count_K[list(stored)] = list(stored.values())
    else:
        count_K = label_counts(source, facts.num_classes, shards=_spread(len(source.shard_ids)))
    return count_K / count_K.sum() if count_K.any() else None


def _spread(num_shards: int) -> Sequence[int]:
    return np.unique(np.linspace(0, num_shards - 1, _SHARDS_LOOKED_AT, dtype=np.int64)).tolist()
