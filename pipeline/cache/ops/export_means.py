"""Exports the class means of a cache as the JSON file that other implementations of ND read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.cache.format.nd_json import DECIMALS, format_nd_json
from pipeline.cache.read.reader import TeacherCache, open_cache
from pipeline.core.errors import CacheError
from pipeline.core.redaction import redact


@dataclass(frozen=True, slots=True)
class ExportedMeans:
    """The number of written classes, D, and the classes of the teacher that have no mean."""

    num_written: int
    embedding_dim: int
    absent: tuple[int, ...]


def export_means(cache_url: str, out_url: str, *, full_precision: bool) -> ExportedMeans:
    """Writes the class means of a finished cache as JSON; classes without a mean are left out.

    Args:
        full_precision: all digits of the fp32 means instead of four decimals.

    Raises:
        CacheError: there is no such cache, or it has no class means.
    """
    cache = open_cache(cache_url)
    means = cache.class_means()
    if means is None:
        raise CacheError(
            "this cache has no class means",
            code="cache.no-class-means",
            where=redact(cache_url),
            next_step="build a cache with cache.class_means=eval into another cache.url",
        )
    has_mean_K = np.asarray(np.isfinite(means.mean_KD).all(axis=1))
    order = _first_seen(cache, has_mean_K)
    decimals = None if full_precision else DECIMALS
    storage.write(out_url, format_nd_json(order, means.mean_KD[order], decimals=decimals))
    absent = np.flatnonzero(~has_mean_K).tolist()
    return ExportedMeans(len(order), means.mean_KD.shape[1], tuple(absent))


def _first_seen(cache: TeacherCache, has_mean_K: NDArray[np.bool_]) -> list[int]:
    """The classes with a mean, in the order of their first sample; then those without a sample, ascending."""
    order: dict[int, None] = {}
    num_expected = int(has_mean_K.sum())
    for shard in cache.shards:
        if len(order) == num_expected:
            break
        index = cache.index(shard)
        classes, firsts = np.unique(index.task.class_ids(index.ok_targets)[1], return_index=True)
        seen = classes[np.argsort(firsts)].tolist()
        order.update(dict.fromkeys(name for name in seen if has_mean_K[name]))
    order.update(dict.fromkeys(np.flatnonzero(has_mean_K).tolist()))
    return list(order)
