"""Several caches that teach one student: the same views of the same samples, or training does not begin.

Then the words of all teachers are about the very pixels that the student sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.read.reader import TeacherCache, ViewColumns
from pipeline.core.errors import CacheError
from pipeline.core.hashing import differences
from pipeline.core.redaction import redact
from pipeline.core.threads import map_ordered
from pipeline.shards.index import ShardIndex

_READ_THREADS = 16
_NUM_NAMED = 5
_DRAWN = ("box_N4", "flip_N", "mix_row_N", "mix_lambda_N")


def check_same_plans(caches: Sequence[TeacherCache]) -> None:
    """
    Raises:
        CacheError: two caches differ in classes, views or reading rules; the difference is spelled out.
    """
    first = caches[0]
    for other in caches[1:]:
        one, two = first.header, other.header
        classes = differences({"num_classes": one.num_classes}, {"num_classes": two.num_classes})
        _refuse(classes, "the teachers of these caches know different classes", first, other)
        _refuse(differences(one.views, two.views), "these caches hold different views", first, other)
        _refuse(differences(first.data, other.data), "these caches read the shards by different rules", first, other)


def check_same_shards(caches: Sequence[TeacherCache]) -> None:
    """
    Raises:
        CacheError: two caches hold different shards, so that it has to be said which to train on.
    """
    first = caches[0]
    names = {shard.shard_id for shard in first.shards}
    for other in caches[1:]:
        theirs = {shard.shard_id for shard in other.shards}
        changed = [*_named("missing", names - theirs), *_named("beyond the other's", theirs - names)]
        _refuse(changed, "these caches hold different shards; data.shards may name those that all hold", first, other)


def _named(what: str, names: set[str]) -> list[str]:
    more = ", …" if len(names) > _NUM_NAMED else ""
    return [f"{len(names)} {what}: {', '.join(sorted(names)[:_NUM_NAMED])}{more}"] if names else []


def check_same_samples(caches: Sequence[TeacherCache], shard_ids: Sequence[str]) -> None:
    """
    Raises:
        CacheError: a shard held other samples, labels or images when another cache was built; the first is named.
    """
    first = caches[0]
    for other in caches[1:]:
        changed = _changed_shards(first, other, shard_ids)
        _refuse(changed[:_NUM_NAMED], f"{len(changed)} shards of these caches hold different samples", first, other)


def _changed_shards(first: TeacherCache, other: TeacherCache, shard_ids: Sequence[str]) -> list[str]:
    ours, theirs = ({shard.shard_id: shard for shard in cache.shards} for cache in (first, other))

    def compare(name: str) -> str | None:
        return _difference(first.index(ours[name]), other.index(theirs[name]))

    # One digest is one index; another may be the same index in the bytes of another Parquet writer.
    doubtful = [name for name in shard_ids if ours[name].index_sha256 != theirs[name].index_sha256]
    return [told for told in map_ordered(compare, doubtful, threads=_READ_THREADS) if told is not None]


def _difference(one: ShardIndex, two: ShardIndex) -> str | None:
    """What the first difference of two indexes of a shard is; where the bytes lie in the tar does not matter."""
    if len(one) != len(two):
        return f"{one.shard_id} had {len(one)} samples -> {len(two)}"
    columns = {
        "key": (one.keys.to_numpy(zero_copy_only=False), two.keys.to_numpy(zero_copy_only=False)),
        "status": (one.status, two.status),
        "label": (one.label, two.label),
        "content_hash": (one.content_hash, two.content_hash),
    }
    for name, (before, after) in columns.items():
        changed = np.flatnonzero(before != after)
        if len(changed):
            row = changed[0]
            return f"{one.sample_ids(changed[:1])[0]} {name}: {before[row]} -> {after[row]}"
    return None


def check_same_views(columns: Sequence[ViewColumns], *, where: str) -> None:
    """What was drawn for a view of a shard is the same in each cache.

    Raises:
        CacheError: it is not; the first such row is named.
    """
    first = columns[0]
    for other in columns[1:]:
        for name, before in _drawn(first).items():
            after = _drawn(other)[name]
            changed = np.flatnonzero((before != after).reshape(len(before), -1).any(axis=1))
            if len(changed):
                raise CacheError(
                    f"{len(changed)} rows were seen otherwise by another teacher",
                    where=f"{where}, row {first.row_N[changed[0]]}",
                    got=f"{name}: {before[changed[0]]} -> {after[changed[0]]}",
                    next_step="one of the caches was changed after it was built; build it again into another cache.url",
                )


def _drawn(columns: ViewColumns) -> dict[str, NDArray[Any]]:
    return {name: getattr(columns, name) for name in _DRAWN} | columns.drawn


def _refuse(changed: Sequence[str], what: str, first: TeacherCache, other: TeacherCache) -> None:
    if changed:
        raise CacheError(
            what,
            where=f"{redact(first.url)} -> {redact(other.url)}",
            got="; ".join(changed),
            next_step="build the caches of several teachers over the same shards, with one data and one views section",
        )
