"""The shards of a run, open for reading on this node."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.shards.shard_urls import report_moved
from pipeline.shards.tar import ShardReader
from pipeline.student.data.local_store import CacheLease, NodeStore
from pipeline.student.data.memo import Memo, max_open


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

    def __init__(self, urls: list[str], store: NodeStore, *, name_shards: str = "append data.shards={}") -> None:
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

    def read(self, shard: int, offset: int, size: int) -> bytes:
        return self._opened.get(shard).reader.read(offset, size)

    def reread(self, shard: int, offset: int, size: int) -> bytes:
        """Reads from a new copy, after the old one turned out to have other bytes. A local shard is read again."""
        if (opened := self._opened.pop(shard)) is not None:
            opened.discard()
        return self.read(shard, offset, size)

    def fetch(self, shard: int) -> None:
        """Copies a shard to this node, unless it is local or copied already. Threads may share it."""
        self._acquire(shard).close()

    def close(self) -> None:
        self._opened.clear()
