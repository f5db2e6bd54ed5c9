"""Views of caches on this node: each (cache, shard, view) is read in one range, checked, joined and mapped."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import xxhash
from torch import Tensor

from pipeline.augment.stored_pixels import decode_view
from pipeline.cache.read.reader import ShardEntry, TeacherCache
from pipeline.core.errors import CacheError, StorageError
from pipeline.core.hashing import short_digest
from pipeline.core.redaction import redact
from pipeline.shards.decode import BadImageError
from pipeline.student.data.ensemble import check_same_views
from pipeline.student.data.join import (
    VERSION,
    DamagedFileError,
    JoinedRows,
    PixelProofs,
    join_rows,
    map_joined,
    read_proofs,
    write_joined,
)
from pipeline.student.data.local_store import CacheLease, NodeStore, name_of
from pipeline.student.data.memo import Memo, max_open


@dataclass(frozen=True, slots=True)
class _OpenView:
    """In each cache."""

    rows: tuple[JoinedRows, ...]
    leases: tuple[CacheLease, ...]
    files: ExitStack

    def close(self) -> None:
        self.files.close()

    def discard(self) -> None:
        """Removes the files, so that they are fetched again."""
        self.files.pop_all()
        for lease in self.leases:
            lease.discard()


class ViewFiles:
    """Views by (position of the shard, view); the last used stay mapped. All caches hold the samples of the first.

    Attributes:
        first: number of the first cache that stores the pixels of its views; 0 if none does.
        pixels: how it stores them, as ``views.pixels``; None: it does not.
    """

    def __init__(
        self,
        caches: Sequence[TeacherCache],
        shards: Sequence[ShardEntry],
        store: NodeStore,
        *,
        outputs: Sequence[str],
    ) -> None:
        """``outputs``: names of those that are read. No rows of the others are gathered."""
        self._caches, self._shards, self._store, self._outputs = caches, shards, store, outputs
        stored = [number for number, cache in enumerate(caches) if cache.header.pixels is not None]
        # All caches hold the views of the first, but not all may store their pixels.
        self.first = stored[0] if stored else 0
        header = caches[self.first].header
        self.pixels, self._size = header.pixels, header.input_size
        self._opened = Memo(self._open, max_open(len(caches)), _OpenView.close)

    def get(self, shard: int, view: int) -> tuple[JoinedRows, ...]:
        """All ok rows of a shard under a view, in each cache; verified against the index.

        Raises:
            CacheError: they are not, or two caches hold different views.
            StorageError: storage fails, or this node's disk does.
        """
        return self._opened[shard, view].rows

    def stored_view(self, shard: int, view: int, byte_range: tuple[int, int, int], *, sample_id: str) -> Tensor:
        """uint8 [3,H,W]: the view at one of ``SampleRows.pixel_ranges``, verified to be the stored one.

        Raises:
            CacheError: its bytes are other ones, or do not decode.
        """
        offset, size, expected = byte_range
        problem = ""
        for _ in range(2):
            data = self._opened[shard, view].rows[self.first].file[offset : offset + size].to_pybytes()
            if (pixel_hash := xxhash.xxh3_64_intdigest(data)) == expected:
                break
            # Only this node's copy may be wrong.
            self._opened.pop((shard, view)).discard()
            problem = f"pixel_hash {pixel_hash:016x}, expected {expected:016x}"
        else:
            raise _changed_pixels(f"{sample_id}, view {view}", problem)
        try:
            return decode_view(data, pixels=self.pixels or "none", size=self._size)
        except BadImageError as error:
            raise _changed_pixels(f"{sample_id}, view {view}", f"{error.status}: {error.reason}") from error

    def proofs(self, shard: int, view: int) -> list[PixelProofs]:
        """The pixel digests of the same rows, in each cache."""
        return [read_proofs(lease.path) for lease in self._opened[shard, view].leases]

    def fetch(self, shard: int, view: int) -> None:
        """Creates the files, if they do not exist. Threads may share it."""
        for cache in self._caches:
            self._acquire(cache, shard, view).close()

    def close(self) -> None:
        self._opened.clear()

    def _open(self, key: tuple[int, int]) -> _OpenView:
        with ExitStack() as files:
            mapped = [self._map(cache, *key, files) for cache in self._caches]
            rows, leases = tuple(rows for rows, _ in mapped), tuple(lease for _, lease in mapped)
            check_same_views(
                [joined.rows_N for joined in rows], where=f"view {key[1]} of {self._shards[key[0]].shard_id}"
            )
            if any(lease.over_budget for lease in leases):
                self._opened.clear()
            return _OpenView(rows, leases, files.pop_all())

    def _map(self, cache: TeacherCache, shard: int, view: int, files: ExitStack) -> tuple[JoinedRows, CacheLease]:
        for _ in range(2):
            lease = self._acquire(cache, shard, view)
            try:
                rows = map_joined(lease.path, outputs=self._outputs)
            except DamagedFileError:
                lease.discard()
            else:
                files.callback(lease.close)
                return rows, lease
        raise StorageError(
            "a file that was just written is read back with different bytes",
            code="storage.disk-corrupts",
            where=str(self._store.folder),
            next_step="set data.local_dir to a folder on another disk",
        )

    def _acquire(self, cache: TeacherCache, shard: int, view: int) -> CacheLease:
        entry = self._shards[shard]
        committed = cache.committed_view(entry.shard_id, view)
        # The content that the file is built from, at any location: runs share files, even for copies of a cache.
        content = [VERSION, cache.header.fingerprint, committed.digest, committed.footer_digest, entry.index_sha256]
        content += ["pixels"] if self._reads_pixels(cache) else []
        name = name_of(short_digest([*content, entry.shard_id, view]), f"{entry.shard_id}-v{view:04d}.arrow")
        return self._store.acquire(name, committed.size_bytes, lambda path: self._write(cache, entry, view, path))

    def _reads_pixels(self, cache: TeacherCache) -> bool:
        return self.pixels is not None and cache is self._caches[self.first]

    def _write(self, cache: TeacherCache, entry: ShardEntry, view: int, path: Path) -> None:
        # The index is the first cache's: another cache may store the same index in other bytes.
        index, where = self._caches[0].index(entry), f"view {view} of {entry.shard_id} in {redact(cache.url)}"
        # A killed process may have written to it.
        with path.open("wb") as file:
            columns = cache.view(entry.shard_id, view, pixels=file if self._reads_pixels(cache) else None)
        write_joined(join_rows(columns, index, where=where), path)


def _changed_pixels(where: str, got: str) -> CacheError:
    return CacheError(
        "a stored view is not the one that the teacher saw",
        code="cache.pixels-changed",
        where=where,
        got=got,
        next_step="run: stillroom cache verify CACHE; then build another cache, or set data.local_dir to another disk",
    )
