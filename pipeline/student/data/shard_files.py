"""The shards of a run, open for reading on this node."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.shards.shard_urls import report_moved
from pipeline.shards.tar import ShardReader
from pipeline.student.data.local_store import CacheLease, NodeStore
from pipeline.student.data.recent import Recent, max_stored


@dataclass(frozen=True, slots=True)
class _OpenShard:
    held: CacheLease
    reader: ShardReader

    def close(self) -> None:
        self.reader.close()
        self.held.close()

    def discard(self) -> None:
        self.reader.close()
        self.held.discard()


class ShardFiles:
    """Shards by position, local or copied once a node; the last used stay open."""

    def __init__(self, urls: list[str], store: NodeStore, *, name_shards: str = "append data.shards={}") -> None:
        """``name_shards``: as of ``open_cached``."""
        self._urls, self._store, self._name_shards = urls, store, name_shards
        self._opened = Recent(self._open, max_stored(2), _OpenShard.close)

    def _open(self, shard: int) -> _OpenShard:
        held = self._acquire(shard)
        if held.crowded:
            self._opened.clear()
        return _OpenShard(held, ShardReader(held.path, where=self._urls[shard]))

    def _acquire(self, shard: int) -> CacheLease:
        with report_moved(self._urls, self._name_shards):
            return self._store.acquire_url(self._urls[shard])

    def read(self, shard: int, offset: int, size: int) -> bytes:
        return self._opened.get(shard).reader.read(offset, size)

    def reread(self, shard: int, offset: int, size: int) -> bytes:
        """The same bytes out of a new copy, for who found others in the old one; local shards are read as they are."""
        if (opened := self._opened.pop(shard)) is not None:
            opened.discard()
        return self.read(shard, offset, size)

    def fetch(self, shard: int) -> None:
        """Copies a shard to this node, unless it is local or there already. Threads may share it."""
        self._acquire(shard).close()

    def close(self) -> None:
        self._opened.clear()
