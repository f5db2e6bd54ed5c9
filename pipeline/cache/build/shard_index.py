"""The index of a shard in a cache: the first part of a shard publishes it, the others read it."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline import storage
from pipeline.cache.build.context import cache_config
from pipeline.cache.format import layout
from pipeline.core.errors import CacheError
from pipeline.core.hashing import digest
from pipeline.core.redaction import redact
from pipeline.shards.index import ShardIndex, check_samples, decode_index, encode_index, index_settings, index_shard
from pipeline.shards.publish import publish_index
from pipeline.shards.shard_urls import shard_id
from schemas.cache_format import FileRef
from schemas.config import Config, DataConfig


@dataclass(frozen=True, slots=True)
class StoredIndex:
    """An index, and its file in the cache. Another version of Parquet might write other bytes."""

    index: ShardIndex
    ref: FileRef

    @classmethod
    def of(cls, index: ShardIndex, data: bytes, shard: str) -> StoredIndex:
        return cls(index, FileRef(path=layout.index_path(shard), sha256=digest(data), size_bytes=len(data)))


@dataclass(frozen=True, slots=True)
class IndexTask:
    """An index to restore: it was removed, and the commits of its shard name its digest."""

    config: Config
    shard_url: str
    sha256: str


def find_index(cache_url: str, shard_url: str, data: DataConfig) -> StoredIndex | None:
    """The index of a shard in the cache, or None if no part of the shard was built.

    Raises:
        ShardError: more samples cannot be used than ``data.bad_samples`` allows.
        CacheError: the index is damaged, or was built with other settings.
    """
    shard = shard_id(shard_url)
    url = storage.join(cache_url, layout.index_path(shard))
    stored = storage.read_if_exists(url, max_bytes=storage.MAX_TABLE_BYTES)
    if stored is None:
        return None
    index = decode_index(stored, where=redact(url), settings=index_settings(data))
    check_samples(index, data, where=shard_url)
    return StoredIndex.of(index, stored, shard)


def publish_new_index(cache_url: str, shard_url: str, index: ShardIndex, data: DataConfig) -> StoredIndex:
    """
    Raises:
        ShardError: more samples cannot be used than ``data.bad_samples`` allows, or the cache has another index.
    """
    check_samples(index, data, where=shard_url)
    encoded = encode_index(index, index_settings(data))
    publish_index(storage.join(cache_url, layout.INDEX), index.shard_id, encoded)
    return StoredIndex.of(index, encoded, index.shard_id)


def restore_index(task: IndexTask) -> None:
    """Indexes a shard again, without the teacher, so that its parts remain valid.

    Raises:
        CacheError: the shard no longer produces the index that its parts were built with.
        ShardError: the shard is damaged.
    """
    data, where = task.config.data, redact(task.shard_url)
    shard, cache_url = shard_id(task.shard_url), cache_config(task.config).url
    got = ""
    with storage.scratch_folder() as scratch:
        local = storage.local_copy(task.shard_url, scratch)
        # An earlier version, which knew only the first rules, may have built the parts.
        for rules in (2, 1):
            index = index_shard(local, data, where=where, threads=task.config.ray.cpus_per_task, rules=rules)
            restored = encode_index(index, index_settings(data))
            if (got := digest(restored)) == task.sha256:
                publish_index(storage.join(cache_url, layout.INDEX), shard, restored)
                return
    raise CacheError(
        "an index is missing, and its shard no longer produces the one that the parts were built with",
        code="cache.index-not-reproducible",
        where=where,
        got=f"sha256 {got[:16]}",
        expected=task.sha256[:16],
        next_step=f"restore the shard or the index; or remove commits/{shard} in {redact(cache_url)} and run the build "
        "again, which builds all parts of this shard again",
    )
