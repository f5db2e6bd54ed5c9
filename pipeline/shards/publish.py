"""Publishes indexes: each is created once, and never replaced by a different one."""

from __future__ import annotations

from dataclasses import dataclass

import xxhash

from pipeline import storage
from pipeline.core.errors import ShardError, StorageError
from pipeline.core.redaction import redact
from pipeline.shards.index import (
    ShardIndex,
    check_samples,
    decode_index,
    encode_index,
    index_settings,
    index_shard,
    omissions_of,
)
from pipeline.shards.omissions import Omissions
from pipeline.shards.shard_urls import shard_id
from schemas.config import DataConfig


@dataclass(frozen=True, slots=True)
class IndexedShard:
    """The number of ok rows of an index, and what it omits; no omissions if the index existed before."""

    num_ok: int
    omissions: Omissions


def index_name(shard: str) -> str:
    """File name of a shard's index in an index folder."""
    return f"{shard}.parquet"


def read_index(url: str) -> ShardIndex:
    """
    Raises:
        CacheError: the index is damaged.
        StorageInputError: it does not exist.
    """
    return decode_index(storage.read(url, max_bytes=storage.MAX_TABLE_BYTES), where=redact(url))


def publish_index(folder_url: str, shard: str, data: bytes) -> None:
    """Writes the index of a shard, or checks that the published one has the same bytes.

    Raises:
        ShardError: it has other bytes, because the shard or the reading rules changed.
    """
    url = storage.join(folder_url, index_name(shard))
    if not storage.create(url, data) and storage.read(url) != data:
        raise ShardError(
            "the index of this shard differs from the published one",
            code="shard.index-conflict",
            where=f"{shard} in {redact(folder_url)}",
            next_step="restore the shard and the data section, or write to another URL",
        )


def publish_shard_index(url: str, *, data: DataConfig, folder_url: str, threads: int) -> IndexedShard:
    """Indexes one shard, unless its index is published.

    Raises:
        ShardError: the shard is damaged, differs from the indexed one, or has bad samples under ``bad_samples: fail``.
        CacheError: the published index is damaged or was built with other settings.
    """
    shard, where = shard_id(url), redact(url)
    target = storage.join(folder_url, index_name(shard))
    settings = index_settings(data)
    if (stored := storage.read_if_exists(target, max_bytes=storage.MAX_TABLE_BYTES)) is not None:
        index = decode_index(stored, where=redact(target), settings=settings)
        _check_last_image(url, index)
        check_samples(index, data, where=url)
        return IndexedShard(index.num_ok, Omissions())
    with storage.scratch_folder() as scratch:
        index = index_shard(storage.local_copy(url, scratch), data, where=where, threads=threads)
    check_samples(index, data, where=url)
    publish_index(folder_url, shard, encode_index(index, settings))
    return IndexedShard(index.num_ok, omissions_of(index))


def _check_last_image(url: str, index: ShardIndex) -> None:
    """One range read: a rewritten shard of the same name is unlikely to have the same last image at this offset."""
    if not index.num_ok:
        return
    row = int(index.ok[-1])
    offset, size_bytes = int(index.offset[row]), int(index.size[row])
    try:
        is_same = xxhash.xxh3_64_intdigest(storage.read_range(url, offset, size_bytes)) == int(index.content_hash[row])
    except StorageError:
        if storage.size(url) >= offset + size_bytes:
            raise
        is_same = False
    if not is_same:
        raise ShardError(
            "this shard is not the one that was indexed",
            code="shard.changed",
            where=f"{redact(url)}, key {index.keys[row]}",
            got="other bytes at the position of the last image",
            next_step="restore the shard, or remove its index and run: stillroom shards index",
        )
