"""The class means that nd learns from: a cached teacher's own, or beside a teacher online those in a cache of his."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.cache.read.reader import TeacherCache
from pipeline.core.errors import CacheError
from pipeline.core.hashing import differences, weights_digest
from pipeline.core.redaction import redact
from pipeline.student.data.sources import RowSource, label_counts
from pipeline.student.losses import check_class_means
from pipeline.teacher.inference import Teacher


def cached_means(cache: TeacherCache, source: RowSource) -> Tensor:
    """[K,D] on the CPU, of the cache that the rows come from.

    Raises:
        CacheError: a class occurs in the labels but has no mean.
    """
    means = cache.class_means()
    assert means is not None, "check_caches_serve has seen to it"
    means_KD = torch.from_numpy(means.mean_KD)
    # Means of the cache's own are of the labels that occur; imported ones may be of others.
    count_K = label_counts(source, len(means_KD)) if means.count_K is None else means.count_K
    check_class_means(means_KD, torch.from_numpy(count_K), where=redact(cache.url))
    return means_KD


def online_means(cache: TeacherCache, teacher: Teacher, source: RowSource, *, section: str) -> Tensor:
    """[K,D] on the CPU, of a cache of this teacher, which may be over other shards and views than are trained on.

    Args:
        section: the teacher's in the YAML, for messages.

    Raises:
        CacheError: the cache is another teacher's, or a class occurs in the labels but has no mean.
    """
    _check_same_teacher(cache, teacher, section)
    means = cache.class_means()
    assert means is not None, "check_means_serve has seen to it"
    means_KD = torch.from_numpy(means.mean_KD)
    check_class_means(
        means_KD, torch.from_numpy(label_counts(source, teacher.module.num_classes)), where=redact(cache.url)
    )
    return means_KD


def _check_same_teacher(cache: TeacherCache, teacher: Teacher, section: str) -> None:
    """Means of another teacher may be as wide: they would load, and mislead."""
    online = {
        "architecture": teacher.loaded.architecture,
        "weights": weights_digest(teacher.state()),
        "mean": list(teacher.loaded.input.mean),
        "std": list(teacher.loaded.input.std),
    }
    changed = differences({key: cache.header.teacher[key] for key in online}, online)
    if changed:
        raise CacheError(
            "these class means are another teacher's",
            where=f"{section}.class_means: {redact(cache.url)}",
            got="; ".join(changed),
            next_step="name a cache of the teacher that is asked, or none and drop nd from the loss section",
        )
