"""Checks of several caches that one student trains from: they must hold the same views of the same samples.

The outputs of all teachers are then for the pixels that the student sees.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.cache.read.reader import TeacherCache
from pipeline.core.errors import CacheError
from pipeline.core.hashing import differences
from pipeline.core.redaction import redact
from pipeline.core.threads import map_ordered
from pipeline.shards.index import ShardIndex
from pipeline.student.data.rows import StructuredRows, is_aug_param
from pipeline.tasks import without_domain

_READ_THREADS = 16
_NUM_NAMED = 5
_VIEW_FIELDS = ("box", "flip", "mix_row", "mix_lambda")


def check_same_plans(caches: Sequence[TeacherCache]) -> None:
    """
    Raises:
        CacheError: two caches differ in classes, views or reading rules; the difference is spelled out.
    """
    first = caches[0]
    for other in caches[1:]:
        before, after = first.header, other.header
        classes = differences({"num_classes": before.num_classes}, {"num_classes": after.num_classes})
        views, data = differences(before.views, after.views), differences(first.data, other.data)
        _refuse(classes, "the teachers of these caches have different classes", "cache.classes-differ", first, other)
        _refuse(views, "these caches hold different views", "cache.views-differ", first, other)
        _refuse(data, "these caches read the shards by different rules", "cache.reading-rules-differ", first, other)


def check_same_shards(caches: Sequence[TeacherCache]) -> None:
    """
    Raises:
        CacheError: two caches hold different shards, and the config does not name those to train on.
    """
    first = caches[0]
    names = {shard.shard_id for shard in first.shards}
    for other in caches[1:]:
        others = {shard.shard_id for shard in other.shards}
        changed = [*_named("missing", names - others), *_named("only in the second", others - names)]
        what = "these caches hold different shards; data.shards may name those that all hold"
        _refuse(changed, what, "cache.shards-differ", first, other)


def _named(what: str, names: set[str]) -> list[str]:
    more = ", …" if len(names) > _NUM_NAMED else ""
    return [f"{len(names)} {what}: {', '.join(sorted(names)[:_NUM_NAMED])}{more}"] if names else []


def check_same_samples(caches: Sequence[TeacherCache], shard_ids: Sequence[str]) -> None:
    """
    Raises:
        CacheError: samples, labels or images of a shard differ between the caches; the first such shard is named.
    """
    first = caches[0]
    for other in caches[1:]:
        changed = _changed_shards(first, other, shard_ids)
        what = f"{len(changed)} shards of these caches hold different samples"
        _refuse(changed[:_NUM_NAMED], what, "cache.samples-differ", first, other)


def _changed_shards(first: TeacherCache, other: TeacherCache, shard_ids: Sequence[str]) -> list[str]:
    shards, others = ({shard.shard_id: shard for shard in cache.shards} for cache in (first, other))

    def compare(name: str) -> str | None:
        return _difference(first.index(shards[name]), other.index(others[name]))

    # Equal digests are equal indexes; different ones may be the same index by another Parquet writer.
    doubtful = [name for name in shard_ids if shards[name].index_sha256 != others[name].index_sha256]
    found = map_ordered(compare, doubtful, threads=_READ_THREADS)
    return [difference for difference in found if difference is not None]


def _difference(index: ShardIndex, other: ShardIndex) -> str | None:
    """The first difference of two indexes of a shard; the positions of the bytes in the tar do not matter."""
    if len(index) != len(other):
        return f"{index.shard_id} had {len(index)} samples -> {len(other)}"
    columns = {
        "key": (index.keys.to_numpy(zero_copy_only=False), other.keys.to_numpy(zero_copy_only=False)),
        "status": (index.status, other.status),
        **{name: (values, other.targets[name]) for name, values in without_domain(index.targets).items()},
        "content_hash": (index.content_hash, other.content_hash),
    }
    for name, (before, after) in columns.items():
        changed = np.flatnonzero((before != after).reshape(len(before), -1).any(1))
        if len(changed):
            row = changed[0]
            return f"{index.sample_ids(changed[:1])[0]} {name}: {before[row]} -> {after[row]}"
    return None


def check_same_views(caches: Sequence[StructuredRows], *, where: str) -> None:
    """Checks that each cache stores the same view of each row of a shard (see ``JoinedRows``).

    Raises:
        CacheError: two of them differ; the first such row is named.
    """
    first = caches[0]
    names = [*_VIEW_FIELDS, *(name for name in first.dtype.names or () if is_aug_param(name))]
    for other in caches[1:]:
        for name in names:
            before, after = first[name], other[name]
            changed = np.flatnonzero((before != after).reshape(len(before), -1).any(axis=1))
            if len(changed):
                raise CacheError(
                    f"the views of {len(changed)} rows differ between the caches",
                    code="cache.views-differ",
                    where=f"{where}, row {first['row'][changed[0]]}",
                    got=f"{name}: {before[changed[0]]} -> {after[changed[0]]}",
                    next_step="one of the caches was changed after it was built; build it again into another cache.url",
                )


def _refuse(changed: Sequence[str], what: str, code: str, first: TeacherCache, other: TeacherCache) -> None:
    if changed:
        raise CacheError(
            what,
            code=code,
            where=f"{redact(first.url)} -> {redact(other.url)}",
            got="; ".join(changed),
            next_step="build the caches of several teachers over the same shards, with one data and one views section",
        )
