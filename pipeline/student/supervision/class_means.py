"""Class means for ``nd``: those of the cache that is trained from, or of a cache of the online teacher."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.cache.build.class_means import ClassMeans
from pipeline.cache.read.reader import TeacherCache
from pipeline.core.errors import CacheError
from pipeline.core.hashing import differences, weights_digest
from pipeline.core.redaction import redact
from pipeline.student.data.sources import RowSource
from pipeline.student.losses import check_class_means
from pipeline.student.supervision.class_frequencies import label_counts
from pipeline.tasks import Task, TaskHead
from pipeline.teacher.inference import Teacher


def cached_means(cache: TeacherCache, source: RowSource, heads: Sequence[TaskHead]) -> dict[str, Tensor]:
    """[K,D] on the CPU by the columns of these heads, from the cache of the training rows.

    Raises:
        CacheError: a class occurs in the labels but has no mean.
    """
    if not heads:
        return {}
    means = _means(cache)
    # A cache computes means of the labels that occur; imported ones may be of others.
    count_K = label_counts(source) if means.count_K is None else means.count_K
    return _by_head(cache, means.mean_KD, count_K, source.task, heads)


def online_means(
    cache: TeacherCache, teacher: Teacher, source: RowSource, heads: Sequence[TaskHead], *, section: str
) -> dict[str, Tensor]:
    """The same from a cache of this teacher, whose shards and views may differ from those of the training.

    Args:
        section: of the teacher in the YAML, for messages.

    Raises:
        CacheError: the cache is another teacher's, or a class occurs in the labels but has no mean.
    """
    if not heads:
        return {}
    check_same_teacher(cache, teacher, f"{section}.class_means")
    return _by_head(cache, _means(cache).mean_KD, label_counts(source), source.task, heads)


def _means(cache: TeacherCache) -> ClassMeans:
    means = cache.class_means()
    assert means is not None, "ensured by check_cached_outputs or check_online_class_means"
    return means


def _by_head(
    cache: TeacherCache, mean_KD: NDArray[np.float32], count_K: NDArray[np.int64], task: Task, heads: Sequence[TaskHead]
) -> dict[str, Tensor]:
    means: dict[str, Tensor] = {}
    for head in heads:
        classes, where = task.class_range(head), redact(cache.url)
        means[head.column] = torch.from_numpy(mean_KD[classes])
        named = where if head.name is None else f"{where}, head {head.name}"
        check_class_means(means[head.column], torch.from_numpy(count_K[classes]), where=named)
    return means


def check_same_teacher(cache: TeacherCache, teacher: Teacher, key: str) -> None:
    """Means of another teacher may have the same width, and would load without an error.

    Args:
        key: of the config, which names the cache.

    Raises:
        CacheError: the cache is another teacher's.
    """
    online = {
        "architecture": teacher.loaded.architecture,
        "weights": weights_digest(teacher.state()),
        "mean": list(teacher.loaded.input.mean),
        "std": list(teacher.loaded.input.std),
    }
    changed = differences({key: cache.header.teacher[key] for key in online}, online)
    if changed:
        raise CacheError(
            "class means or moments of another teacher are named for this one",
            code="cache.other-teacher",
            where=f"{key}: {redact(cache.url)}",
            got="; ".join(changed),
            next_step="name a cache of the online teacher, or none and leave out nd or standardize",
        )
