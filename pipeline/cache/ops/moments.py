"""Computes mean and covariance of the embeddings of a finished cache, and stores them in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial, reduce

from pipeline import storage
from pipeline.cache.build.manifest import read_table
from pipeline.cache.build.moments import MergeTree, MomentSums, encode_moments, merge, moment_sums
from pipeline.cache.format import layout
from pipeline.cache.read.moments import find_moments
from pipeline.cache.read.reader import TeacherCache, open_cache
from pipeline.core.errors import CacheError
from pipeline.core.hashing import digest, seal
from pipeline.core.redaction import redact
from pipeline.tasks import EMBEDDING
from schemas.cache_format import FileRef, Moments

SHARDS_PER_TASK = 8
"""Part of the order in which sums are merged, and so of the result's last bits."""

ShardSums = Callable[[tuple[str, ...]], MomentSums | None]
Run = Callable[[ShardSums, Sequence[tuple[str, ...]]], Iterable[tuple[tuple[str, ...], MomentSums | None]]]
"""Applies a function to each item: (item, result) in any order."""


def compute_moments(cache_url: str, run: Run | None = None) -> tuple[Moments, bool]:
    """The record of the moments of a finished cache, and whether this call computed them: they are computed once for
    each state of a cache.

    All rows of all complete views count, mixed ones as well: they are what a student is trained on.

    Args:
        run: for callers that read the shards in other processes; default: one after another.

    Raises:
        CacheError: there is no such cache, it stores no embeddings, or it has fewer than two rows.
    """
    cache = open_cache(cache_url)
    if cache.header.output(EMBEDDING) is None:
        raise CacheError(
            "this cache stores no embeddings",
            code="cache.no-embeddings",
            where=redact(cache_url),
            got="cache.embeddings=none",
            next_step="build a cache with cache.embeddings=fp16 into another cache.url",
        )
    if (stored := find_moments(cache)) is not None:
        return stored, False
    # A store that cannot create a record once would fail only after hours of sums.
    storage.probe(cache.url)
    sums = _sum_all(cache, run or _one_after_another)
    return _publish(cache, sums)


def _one_after_another(
    sums_of: ShardSums, items: Sequence[tuple[str, ...]]
) -> Iterator[tuple[tuple[str, ...], MomentSums | None]]:
    return ((item, sums_of(item)) for item in items)


def _sum_all(cache: TeacherCache, run: Run) -> MomentSums | None:
    names = [shard.shard_id for shard in cache.shards]
    items = [tuple(names[start : start + SHARDS_PER_TASK]) for start in range(0, len(names), SHARDS_PER_TASK)]
    number = {item: position for position, item in enumerate(items)}
    tree = MergeTree(len(items))
    for item, sums in run(partial(sum_shards, cache.url, cache.manifest_bytes), items):
        tree.add(number[item], sums)
    return tree.result()


def sum_shards(cache_url: str, manifest_bytes: bytes, shard_ids: tuple[str, ...]) -> MomentSums | None:
    """The sums over all views of these shards, in order; None if they have no rows."""
    cache = _opened(cache_url, manifest_bytes)
    blocks = (block for shard in shard_ids for view in range(cache.num_views) for block in _of_view(cache, shard, view))
    first = next(blocks, None)
    return None if first is None else reduce(merge, blocks, first)


@lru_cache(maxsize=1)
def _opened(cache_url: str, manifest_bytes: bytes) -> TeacherCache:
    """A worker reads the manifest's tables once, not for each task."""
    return open_cache(cache_url, manifest_bytes=manifest_bytes)


def _of_view(cache: TeacherCache, shard_id: str, view: int) -> Iterator[MomentSums]:
    columns = cache.view(shard_id, view)
    return moment_sums(columns.decoded(EMBEDDING), columns.mix_row_N != columns.row_N)


def _publish(cache: TeacherCache, sums: MomentSums | None) -> tuple[Moments, bool]:
    data, manifest_sha256 = encode_moments(sums, where=redact(cache.url)), digest(cache.manifest_bytes)
    assert sums is not None, "encode_moments refuses too few rows"
    sha256 = digest(data)
    path = layout.moments_table_path(manifest_sha256, sha256)
    num_stored = int(read_table(cache.url, cache.manifest.parts)["rows"].to_numpy().sum())
    record = Moments(
        manifest_sha256=manifest_sha256,
        fingerprint=cache.header.fingerprint,
        num_rows=sums.num_rows,
        num_mixed=sums.num_mixed,
        skipped=cache.manifest.skipped,
        num_further=num_stored - sums.num_rows,
        table=FileRef(path=path, sha256=sha256, size_bytes=len(data)),
    )
    storage.write(storage.join(cache.url, path), data)
    url = storage.join(cache.url, layout.moments_path(manifest_sha256))
    if storage.create(url, seal(record.model_dump(mode="json"))):
        return record, True
    # Another process was faster; its file may have another name, if its version of Parquet writes other bytes.
    stored = find_moments(cache)
    assert stored is not None, "a record is never removed while a cache is read"
    return stored, False
