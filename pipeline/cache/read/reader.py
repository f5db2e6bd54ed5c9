"""Read a finished cache: one checked range for each (shard, view), decoded on demand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import storage
from pipeline.augment.params import EVAL_VIEW
from pipeline.cache.build.class_means import ClassMeans, decode_means
from pipeline.cache.build.manifest import locate, parse_manifest, read_manifest, read_table
from pipeline.cache.format import layout
from pipeline.cache.format.codec import LinearHead, column_name, column_of, decode, depends_on_temperature, raw_rows
from pipeline.cache.format.files import (
    REBUILD,
    check_sha256,
    empty_cells,
    read_file,
    read_named,
)
from pipeline.cache.format.head_file import read_head
from pipeline.cache.format.header import no_cache, parse_header, plan_of, read_outputs
from pipeline.cache.read.view_range import CommittedView, read_view
from pipeline.core.errors import CacheError
from pipeline.core.hashing import digest
from pipeline.core.redaction import quoted, redact
from pipeline.shards.index import ShardIndex, decode_index
from pipeline.tasks import EMBEDDING
from pipeline.tasks.classification import LOGITS
from schemas.cache_format import PIXEL_HASH, PIXELS, Header, Manifest, Output, aug_param_columns


@dataclass(frozen=True, slots=True)
class StoredRows:
    """N encoded rows of one output; ``head`` computes it from rows of the embedding, where its encoding is ``head``."""

    column: pa.Array
    output: Output
    head: LinearHead | None = None

    def __len__(self) -> int:
        return len(self.column)

    @property
    def depends_on_temperature(self) -> bool:
        """Whether ``decode`` is a function of the temperature."""
        return depends_on_temperature(self.output)

    def take(self, row_N: NDArray[np.integer[Any]]) -> StoredRows:
        """The rows at these positions."""
        return StoredRows(column_of(raw_rows(self.column).take(row_N, axis=0)), self.output, self.head)

    def decode(self, *, temperature: float = 1.0) -> NDArray[np.float32]:
        """[N,…] fp32 at the temperature of the loss that reads them."""
        return decode(self.column, self.output, temperature=temperature, head=self.head)


@dataclass(frozen=True, slots=True)
class StoredPixels:
    """Where the views of N rows are in the file to which they were copied, and the xxh3 of their bytes."""

    offset_N: NDArray[np.int64]
    size_N: NDArray[np.int64]
    hash_N: NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class ViewColumns:
    """The columns of one view of one shard: N ok rows in tar order.

    Attributes:
        outputs: the stored ones, by name.
        pixels: None: the views are not stored, or were not copied.
    """

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
    pixels: StoredPixels | None = None

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

    @cached_property
    def head(self) -> LinearHead | None:
        """Computes the logits from the embeddings; None: logits are stored, or there are none."""
        return read_head(self.url, self.header)

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

    def view(self, shard_id: str, view: int, *, pixels: BinaryIO | None = None) -> ViewColumns:
        """The columns of one view of one shard.

        Args:
            pixels: the stored views are appended to this file, if the cache has them. What was written has no meaning
                if an error is raised.

        Raises:
            CacheError: the cache does not have the view, or its bytes were changed.
        """
        committed = self.committed_view(shard_id, view)
        is_eval = view == EVAL_VIEW
        # Neither the options of the plan nor stored views are part of the eval pass.
        aug_params = {} if is_eval else aug_param_columns(plan_of(self.header))
        has_pixels = self.header.pixels is not None and not is_eval
        tables: list[pa.Table] = []
        sizes: list[NDArray[np.int64]] = []
        reads_pixels = has_pixels and pixels is not None
        for table in read_view(self.url, committed, has_pixels=has_pixels, reads_pixels=reads_pixels):
            if has_pixels and pixels is not None:
                sizes.append(_copy_pixels(table[PIXELS], pixels))
            tables.append(table.drop_columns([PIXELS]) if reads_pixels else table)
        table = pa.concat_tables(tables)
        columns = _view_columns(table, self.header, list(aug_params), self.head)
        if not sizes:
            return columns
        size_N = np.concatenate(sizes)
        _check_filled(table, PIXEL_HASH)
        stored = StoredPixels(np.cumsum(size_N) - size_N, size_N, table[PIXEL_HASH].to_numpy())
        return replace(columns, pixels=stored)


def _copy_pixels(column: pa.ChunkedArray, file: BinaryIO) -> NDArray[np.int64]:
    """Appends the stored views to the file. Returns their sizes in bytes.

    Raises:
        CacheError: a cell is empty.
    """
    if column.null_count:
        raise empty_cells(PIXELS, column)
    for chunk in column.chunks:
        # The bytes of all rows, one after another.
        if pa.types.is_fixed_size_binary(chunk.type):
            file.write(raw_rows(chunk).data)
        else:
            offsets = np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            file.write(chunk.buffers()[2][int(offsets[0]) : int(offsets[-1])])
    return pc.call_function("binary_length", [column]).to_numpy().astype(np.int64)


def _view_columns(table: pa.Table, header: Header, aug_params: list[str], head: LinearHead | None) -> ViewColumns:
    for name in ("row", "content_hash", "embedding_norm", "mix_row", "mix_lambda", "flip", *aug_params):
        _check_filled(table, name)
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
        outputs={output.name: _stored(table, output, head) for output in read_outputs(header)},
        pixel_digest=tuple(table["pixel_digest"].to_pylist()),
        pixel_mean=tuple(table["pixel_mean"].to_pylist()),
    )


def _check_filled(table: pa.Table, name: str) -> None:
    if table[name].null_count:
        raise empty_cells(name, table[name])


def _stored(table: pa.Table, output: Output, head: LinearHead | None) -> StoredRows:
    name = column_name(output)
    _check_filled(table, name)
    return StoredRows(table[name].combine_chunks(), output, head)


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
