"""Read a finished cache: one checked range for each (shard, view), decoded on demand."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage
from pipeline.augment.params import EVAL_VIEW
from pipeline.cache.build.class_means import ClassMeans, decode_means
from pipeline.cache.build.manifest import locate, parse_manifest, read_manifest, read_table
from pipeline.cache.format import layout
from pipeline.cache.format.codec import column_of, decode, depends_on_temperature, raw_rows
from pipeline.cache.format.files import (
    REBUILD,
    changed_file,
    check_sha256,
    empty_cells,
    missing_file,
    read_file,
    read_named,
)
from pipeline.cache.format.header import no_cache, parse_header, plan_of, read_outputs
from pipeline.core.bounded_parquet import read_bounded
from pipeline.core.errors import CacheError, StorageError, StorageInputError
from pipeline.core.hashing import digest
from pipeline.core.redaction import quoted, redact
from pipeline.shards.index import ShardIndex, decode_index
from pipeline.tasks import EMBEDDING
from pipeline.tasks.classification import LOGITS
from schemas.cache_format import Header, Manifest, Output, aug_param_columns


@dataclass(frozen=True, slots=True)
class StoredRows:
    """N encoded rows of one output."""

    column: pa.Array
    output: Output

    def __len__(self) -> int:
        return len(self.column)

    @property
    def depends_on_temperature(self) -> bool:
        """Whether ``decode`` is a function of the temperature."""
        return depends_on_temperature(self.output)

    def take(self, row_N: NDArray[np.integer[Any]]) -> StoredRows:
        """The rows at these positions."""
        return StoredRows(column_of(raw_rows(self.column).take(row_N, axis=0)), self.output)

    def decode(self, *, temperature: float = 1.0) -> NDArray[np.float32]:
        """[N,…] fp32 at the temperature of the loss that reads them."""
        return decode(self.column, self.output, temperature=temperature)


@dataclass(frozen=True, slots=True)
class ViewColumns:
    """The columns of one view of one shard: N ok rows in tar order. ``outputs`` are the stored ones, by name."""

    row_N: NDArray[np.int32]
    content_hash_N: NDArray[np.uint64]
    box_N4: NDArray[np.int32]
    flip_N: NDArray[np.bool_]
    mix_row_N: NDArray[np.int32]
    mix_lambda_N: NDArray[np.float32]
    aug_params: dict[str, NDArray[Any]]
    embedding_norm_N: NDArray[np.float32]
    outputs: Mapping[str, StoredRows]
    pixel_digest: tuple[bytes | None, ...]
    pixel_mean: tuple[bytes | None, ...]

    def decoded(self, name: str) -> NDArray[np.float32]:
        """All rows of a stored output, decoded at T = 1."""
        return self.outputs[name].decode()

    @property
    def logits_NK(self) -> NDArray[np.float32] | None:
        """``decoded("logits")``. None if the cache has no output of this name."""
        return self.decoded(LOGITS) if LOGITS in self.outputs else None

    @property
    def embedding_ND(self) -> NDArray[np.float32] | None:
        """``decoded("embedding")``. None if the cache has no embeddings."""
        return self.decoded(EMBEDDING) if EMBEDDING in self.outputs else None


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard of the manifest."""

    shard_id: str
    path: str
    size_bytes: int
    num_ok: int
    index_sha256: str

    @classmethod
    def from_table(cls, table: pa.Table) -> list[ShardEntry]:
        """The rows of the manifest's table of shards."""
        columns = (table[name].to_pylist() for name in ("shard_id", "path", "size_bytes", "num_ok", "index_sha256"))
        return [cls(*row) for row in zip(*columns, strict=True)]


class CommittedView(NamedTuple):
    """The row of one view of one shard in the manifest's table of parts: its bytes and those of the part's footer."""

    shard_id: str
    view: int
    path: str
    part_sha256: str
    part_size_bytes: int
    offset: int
    size_bytes: int
    footer_offset: int
    footer_digest: str
    rows: int
    digest: str


_REPEATED = ("shard_id", "path", "part_sha256", "footer_digest")
"""Columns of the table of parts that have the same text for all views of a part."""


@dataclass(frozen=True, slots=True)
class PartsIndex:
    """Finds the row of a (shard, view) with 16 bytes per row. A dict of ten million pairs would take gigabytes.

    Attributes:
        table: the manifest's table of parts with P rows, its shards as a dictionary.
        number: the number of each shard, in no particular order.
        key_P: the number of the shard and the view as one number, ascending.
        row_P: the row of each key.
    """

    table: pa.Table
    number: dict[str, int]
    key_P: NDArray[np.int64]
    row_P: NDArray[np.int64]

    @classmethod
    def of(cls, table: pa.Table) -> PartsIndex:
        shards = table["shard_id"].unify_dictionaries().combine_chunks()
        key_P = _key(shards.indices.to_numpy().astype(np.int64), table["view"].to_numpy().astype(np.int64))
        row_P = np.argsort(key_P, kind="stable")
        number = {shard: number for number, shard in enumerate(shards.dictionary.to_pylist())}
        return cls(table, number, key_P[row_P], row_P)

    def entry(self, shard_id: str, view: int) -> dict[str, Any] | None:
        """The row as a dict, or None if the cache does not have this view."""
        number = self.number.get(shard_id)
        if number is None:
            return None
        key = _key(np.int64(number), np.int64(view))
        at = int(np.searchsorted(self.key_P, key))
        if at == len(self.key_P) or self.key_P[at] != key:
            return None
        return self.table.slice(int(self.row_P[at]), 1).to_pylist()[0]


def _key(number: Any, view: Any) -> Any:
    return number << 16 | view


class TeacherCache:
    """A finished cache, opened for reading. ``manifest_bytes`` is the manifest, or a run's copy of it."""

    def __init__(self, url: str, manifest: Manifest, manifest_bytes: bytes, header: Header) -> None:
        self.url, self.manifest, self.manifest_bytes, self.header = url, manifest, manifest_bytes, header

    @property
    def num_views(self) -> int:
        """V, the number of views of every image."""
        return self.manifest.num_views

    @property
    def data(self) -> dict[str, Any]:
        """The settings of the indexes in use."""
        return self.header.data if self.manifest.labels is None else self.manifest.labels.data

    @cached_property
    def shards(self) -> list[ShardEntry]:
        return ShardEntry.from_table(read_table(self.url, self.manifest.shards))

    @cached_property
    def _parts(self) -> PartsIndex:
        return PartsIndex.of(read_table(self.url, self.manifest.parts, repeated=_REPEATED))

    def index(self, shard: ShardEntry) -> ShardIndex:
        """The shard's index, checked against the manifest."""
        is_relabelled = self.manifest.labels is not None
        path = (
            layout.relabelled_path(shard.shard_id, shard.index_sha256)
            if is_relabelled
            else layout.index_path(shard.shard_id)
        )
        where = redact(storage.join(self.url, path))
        data = read_file(self.url, path)
        remedy = f"run: stillroom cache relabel {quoted(self.url)}" if is_relabelled else REBUILD
        check_sha256(data, shard.index_sha256, where=where, next_step=remedy)
        return decode_index(data, where=where)

    def shard_url(self, shard: ShardEntry) -> str:
        """The URL of the shard at build time, without its query."""
        return locate(self.manifest.base, shard.path)

    def class_means(self) -> ClassMeans | None:
        """The mean embedding of each class, or None if the cache has none."""
        ref = self.manifest.class_means
        if ref is None:
            return None
        return decode_means(
            read_named(self.url, ref),
            num_classes=self.header.num_classes,
            fingerprint=self.header.fingerprint,
            where=redact(storage.join(self.url, ref.path)),
        )

    def committed_view(self, shard_id: str, view: int) -> CommittedView:
        """Where the bytes of one view of one shard are, with their digests.

        Raises:
            CacheError: the cache does not have the view.
        """
        entry = self._parts.entry(shard_id, view)
        if entry is None:
            raise CacheError(
                "the cache does not have this view",
                code="cache.missing-view",
                where=f"{shard_id}, view {view} in {redact(self.url)}",
                expected=f"views 0..{self.num_views - 1}",
                next_step="raise views.count and run: stillroom cache build CONFIG",
            )
        return CommittedView(**entry)

    def view(self, shard_id: str, view: int) -> ViewColumns:
        """The columns of one view of one shard.

        Raises:
            CacheError: the cache does not have the view, or its bytes were changed.
        """
        committed = self.committed_view(shard_id, view)
        # The options of the plan do not apply to the eval pass.
        aug_params = {} if view == EVAL_VIEW else aug_param_columns(plan_of(self.header))
        return _view_columns(self._fetch(committed), self.header, list(aug_params))

    def _fetch(self, view: CommittedView) -> pa.Table:
        url = storage.join(self.url, view.path)
        where = f"view {view.view} of {redact(url)}"
        offset, size_bytes, end, footer = view.offset, view.size_bytes, view.part_size_bytes, view.footer_offset
        data = _read_range(url, offset, size_bytes, end=end, digest=view.digest, where=where)
        tail = _read_range(url, footer, end - footer, end=end, digest=view.footer_digest, where=f"footer of {where}")
        source = _Range(end, offset, data)
        try:
            # With its metadata given, Parquet does not read the last 64 KiB of the file to find the footer.
            metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + tail))
            table = read_bounded(
                pa.PythonFile(source, mode="r"),
                size_bytes=size_bytes,
                metadata=metadata,
                row_groups=_row_groups(metadata, offset, offset + size_bytes),
            )
        except (pa.ArrowInvalid, OSError) as error:
            raise CacheError(
                "this part is damaged", code="cache.damaged-part", where=where, got=str(error), next_step=REBUILD
            ) from error
        if table.num_rows != view.rows:
            raise CacheError(
                "the number of rows of a view of this part differs from its commit",
                code="cache.damaged-part",
                where=where,
                got=table.num_rows,
                expected=view.rows,
                next_step=REBUILD,
            )
        return table


def _read_range(url: str, offset: int, size_bytes: int, *, end: int, digest: str, where: str) -> bytes:
    try:
        data = storage.read_range(url, offset, size_bytes)
    except StorageInputError as error:
        raise missing_file(url, error) from error
    except StorageError as error:
        _check_size(url, end, error)
        raise
    if hashlib.sha256(data).hexdigest() != digest:
        raise changed_file(where)
    return data


def _check_size(url: str, expected: int, cause: StorageError) -> None:
    """Raises for a truncated part, which no retry repairs, so that the caller can raise the error of storage."""
    if (got := storage.size(url)) != expected:
        raise CacheError(
            "the size of this part differs from that in its commit",
            code="cache.truncated-part",
            where=redact(url),
            got=f"{got} bytes",
            expected=f"{expected} bytes",
            next_step=REBUILD,
        ) from cause


class _Range(io.RawIOBase):
    """A file of which one range was fetched. Reading outside of the range raises OSError."""

    def __init__(self, size_bytes: int, offset: int, data: bytes) -> None:
        self._size, self._offset, self._data, self._position = size_bytes, offset, data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        start, stop = self._position, self._size if size < 0 else min(self._size, self._position + size)
        if start < self._offset or stop > self._offset + len(self._data):
            raise OSError(f"bytes {start}..{stop} were not fetched")
        self._position = stop
        return self._data[start - self._offset : stop - self._offset]


def _row_groups(metadata: pq.FileMetaData, start: int, stop: int) -> list[int]:
    return [
        number
        for number in range(metadata.num_row_groups)
        if start <= metadata.row_group(number).column(0).data_page_offset < stop
    ]


def _view_columns(table: pa.Table, header: Header, aug_params: list[str]) -> ViewColumns:
    for name in ("row", "content_hash", "embedding_norm", "mix_row", "mix_lambda", "flip", *aug_params):
        if table[name].null_count:
            raise empty_cells(name, table[name])
    box = [table[f"box_{side}"].to_numpy() for side in ("left", "top", "width", "height")]
    return ViewColumns(
        row_N=table["row"].to_numpy(),
        content_hash_N=table["content_hash"].to_numpy(),
        box_N4=np.stack(box, axis=1),
        flip_N=table["flip"].combine_chunks().to_numpy(zero_copy_only=False),
        mix_row_N=table["mix_row"].to_numpy(),
        mix_lambda_N=table["mix_lambda"].to_numpy(),
        aug_params={name: table[name].to_numpy() for name in aug_params},
        embedding_norm_N=table["embedding_norm"].to_numpy(),
        outputs={output.name: _stored(table, output) for output in read_outputs(header)},
        pixel_digest=tuple(table["pixel_digest"].to_pylist()),
        pixel_mean=tuple(table["pixel_mean"].to_pylist()),
    )


def _stored(table: pa.Table, output: Output) -> StoredRows:
    if table[output.name].null_count:
        raise empty_cells(output.name, table[output.name])
    return StoredRows(table[output.name].combine_chunks(), output)


def open_cache(url: str, *, manifest_bytes: bytes | None = None) -> TeacherCache:
    """Opens a finished cache, in the state that ``manifest_bytes`` describes, if given.

    Raises:
        CacheError: there is no cache, it is unfinished or damaged, or its header and manifest do not match.
    """
    where = redact(url)
    if manifest_bytes is None:
        manifest, manifest_bytes = read_manifest(url)
    else:
        manifest = parse_manifest(manifest_bytes, where=f"the run's copy of the manifest of {where}")
    try:
        data = read_file(url, layout.HEADER, max_bytes=storage.MAX_RECORD_BYTES)
    except CacheError:
        # The folder of a run has a copy of a cache's manifest, without the tables that the manifest names.
        if not storage.exists(storage.join(url, manifest.parts.path)):
            raise no_cache(url) from None
        raise
    if digest(data) != manifest.header_sha256:
        raise CacheError(
            "this header is not the one of the manifest",
            code="cache.header-not-of-manifest",
            where=redact(storage.join(url, layout.HEADER)),
            next_step=REBUILD,
        )
    return TeacherCache(url, manifest, manifest_bytes, parse_header(data, where=where))
