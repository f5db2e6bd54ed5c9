"""The images of a run's shards, read on this node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import xxhash
from torch import Tensor

from pipeline.core.errors import CacheError, ShardError
from pipeline.shards.decode import BadImageError, decode
from pipeline.shards.shard_urls import report_moved
from pipeline.shards.tar import ShardReader
from pipeline.student.data.local_store import CacheLease, NodeStore
from pipeline.student.data.memo import Memo, max_open
from pipeline.tasks import Task, UndecodableTargetError


@dataclass(frozen=True, slots=True)
class _OpenShard:
    lease: CacheLease
    reader: ShardReader

    def close(self) -> None:
        self.reader.close()
        self.lease.close()

    def discard(self) -> None:
        self.reader.close()
        self.lease.discard()


class ShardFiles:
    """Shards by position, local or copied once a node; the last used stay open."""

    def __init__(self, urls: list[str], store: NodeStore, *, name_shards: str) -> None:
        """``name_shards``: as of ``open_cached``."""
        self._urls, self._store, self._name_shards = urls, store, name_shards
        self._opened = Memo(self._open, max_open(2), _OpenShard.close)

    def _open(self, shard: int) -> _OpenShard:
        lease = self._acquire(shard)
        if lease.over_budget:
            self._opened.clear()
        return _OpenShard(lease, ShardReader(lease.path, where=self._urls[shard]))

    def _acquire(self, shard: int) -> CacheLease:
        with report_moved(self._urls, self._name_shards):
            return self._store.acquire_url(self._urls[shard])

    def image(self, shard: int, byte_range: tuple[int, int, int], *, sample_id: str, max_pixels: int) -> Tensor:
        """The image at one of ``SampleRows.byte_ranges``, uint8 [3,H,W], verified to be the one that was indexed.

        Raises:
            CacheError: the tar holds other bytes now.
            ShardError: they no longer decode, or the tar ends before them.
        """
        data = self._read(shard, byte_range, sample_id, what="an image", code="shard.image-changed")
        try:
            return decode(data, max_pixels=max_pixels)
        except BadImageError as error:
            raise ShardError(
                "an image that was usable when its shard was indexed is unusable now",
                code="shard.image-undecodable-now",
                where=sample_id,
                got=f"{error.status}: {error.reason}",
                next_step="use the decoder versions that built the index",
            ) from error

    def target(self, shard: int, byte_range: tuple[int, int, int], task: Task, *, sample_id: str) -> Any:
        """The mask or the boxes at one of ``SampleRows.target_ranges``, verified to be those that were indexed, as
        ``task.decode_target`` returns them.

        Raises:
            CacheError: the tar holds other bytes now.
            ShardError: they no longer decode, or the tar ends before them.
        """
        data = self._read(shard, byte_range, sample_id, what="a mask, or boxes,", code="shard.target-changed")
        try:
            return task.decode_target(data)
        except UndecodableTargetError as error:
            raise ShardError(
                f"{task.member_content} was usable when its shard was indexed and is unusable now",
                code="shard.image-undecodable-now",
                where=sample_id,
                got=str(error),
                next_step="use the decoder versions that built the index",
            ) from error

    def _read(self, shard: int, byte_range: tuple[int, int, int], sample_id: str, *, what: str, code: str) -> bytes:
        offset, size, expected = byte_range
        data = self._opened[shard].reader.read(offset, size)
        if (content_hash := xxhash.xxh3_64_intdigest(data)) != expected:
            # Only this node's copy may be wrong: a new one is read, or the same file if it is local.
            self._opened.pop(shard).discard()
            data = self._opened[shard].reader.read(offset, size)
            content_hash = xxhash.xxh3_64_intdigest(data)
        if content_hash != expected:
            raise CacheError(
                f"{what} of a shard is not the one that was indexed",
                code=code,
                where=sample_id,
                got=f"content hash {content_hash:016x}",
                expected=f"{expected:016x}",
                next_step="the shard changed since; restore it, or build another cache or index from it; after "
                "cache relabel --shards, name those shards",
            )
        return data

    def fetch(self, shard: int) -> None:
        """Copies a shard to this node, unless it is local or copied already. Threads may share it."""
        self._acquire(shard).close()

    def close(self) -> None:
        self._opened.clear()
