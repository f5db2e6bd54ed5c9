"""Views of caches on this node: of each (cache, shard, view) one range read, proven, joined, and mapped by everyone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.cache.read.reader import ShardEntry, TeacherCache, ViewColumns
from pipeline.core.errors import StorageError
from pipeline.core.hashing import short
from pipeline.core.redaction import redact
from pipeline.student.data.ensemble import check_same_views
from pipeline.student.data.join import (
    VERSION,
    DamagedFileError,
    JoinedRows,
    join_rows,
    map_joined,
    with_proofs,
    write_joined,
)
from pipeline.student.data.local_store import CacheLease, NodeStore, name_of
from pipeline.student.data.recent import Recent, max_stored


@dataclass(frozen=True, slots=True)
class _OpenView:
    """Of each cache."""

    rows: tuple[JoinedRows, ...]
    held: tuple[CacheLease, ...]
    files: ExitStack

    def close(self) -> None:
        self.files.close()


class ViewFiles:
    """Views by (position of the shard, view); the last used stay mapped. All caches hold the samples of the first."""

    def __init__(
        self,
        caches: Sequence[TeacherCache],
        shards: Sequence[ShardEntry],
        store: NodeStore,
        *,
        with_embeddings: bool,
    ) -> None:
        self._caches, self._shards, self._store = caches, shards, store
        self._keeps_embeddings = with_embeddings
        self._opened = Recent(self._open, max_stored(len(caches)), _OpenView.close)

    def get(self, shard: int, view: int) -> tuple[JoinedRows, ...]:
        """Of each cache all ok rows of a shard under a view, proven to be those of the index.

        Raises:
            CacheError: they are not, or two caches hold different views.
            StorageError: storage fails, or this node's disk does.
        """
        return self._opened.get((shard, view)).rows

    def columns(self, shard: int, view: int) -> tuple[ViewColumns, ...]:
        """The same with pixel digests, as the caches hold them."""
        opened = self._opened.get((shard, view))
        return tuple(with_proofs(rows.columns, held.path) for rows, held in zip(opened.rows, opened.held, strict=True))

    def fetch(self, shard: int, view: int) -> None:
        """Makes the files, unless they are there already. Threads may share it."""
        for cache in self._caches:
            self._acquire(cache, shard, view).close()

    def close(self) -> None:
        self._opened.clear()

    def _open(self, key: tuple[int, int]) -> _OpenView:
        with ExitStack() as files:
            found = [self._map(cache, *key, files) for cache in self._caches]
            where = f"view {key[1]} of {self._shards[key[0]].shard_id}"
            check_same_views([rows.columns for rows, _ in found], where=where)
            if any(held.crowded for _, held in found):
                self._opened.clear()
            return _OpenView(tuple(rows for rows, _ in found), tuple(held for _, held in found), files.pop_all())

    def _map(self, cache: TeacherCache, shard: int, view: int, files: ExitStack) -> tuple[JoinedRows, CacheLease]:
        for _ in range(2):
            held = self._acquire(cache, shard, view)
            try:
                rows = map_joined(held.path, cache.header.outputs)
            except DamagedFileError:
                held.discard()
            else:
                files.callback(held.close)
                if not self._keeps_embeddings:
                    # Most losses take norms and class means; embeddings would be gathered for nobody.
                    rows = replace(rows, columns=replace(rows.columns, embedding=None))
                return rows, held
        raise StorageError(
            "a file that was just written is read as other bytes",
            where=str(self._store.folder),
            next_step="set data.local_dir to a folder on another disk",
        )

    def _acquire(self, cache: TeacherCache, shard: int, view: int) -> CacheLease:
        entry = self._shards[shard]
        committed = cache.committed_view(entry.shard_id, view)
        # What the file is made of, wherever that lies: runs share it, also those of copies of a cache.
        made_of = [VERSION, cache.header.fingerprint, committed.digest, committed.footer_digest, entry.index_sha256]
        name = name_of(short([*made_of, entry.shard_id, view]), f"{entry.shard_id}-v{view:04d}.arrow")
        return self._store.acquire(name, committed.size_bytes, lambda part: self._make(cache, entry, view, part))

    def _make(self, cache: TeacherCache, entry: ShardEntry, view: int, path: Path) -> None:
        """The index is the first cache's: that of another one says the same in other bytes, maybe."""
        index, where = self._caches[0].index(entry), f"view {view} of {entry.shard_id} in {redact(cache.url)}"
        write_joined(join_rows(cache.view(entry.shard_id, view), index, where=where), path)
