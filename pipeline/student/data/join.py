"""One view of one shard, joined with the shard's index: a file that every loader process of a node maps.

The stored views, if the cache has them; an Arrow stream of one uncompressed batch, and its offset; the XXH3-128 of the
stream and the offset. Mapped columns are the arrays themselves: nothing is decoded or copied when a process opens the
file, and all processes share its pages. The digest leaves out the views, each of which has a hash: a process reads only
those of its rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from pipeline.cache.format.codec import column_name, column_of, raw_rows
from pipeline.cache.read.reader import ViewColumns
from pipeline.core.errors import CacheError
from pipeline.shards.index import ShardIndex
from pipeline.student.data.rows import StructuredRows, as_structured_rows
from pipeline.tasks import without_domain

VERSION = 4
"""Of the file. Files of different versions have different names."""

_OFFSET_BYTES, _DIGEST_BYTES = 8, 16


class DamagedFileError(Exception):
    """The bytes are not those that were written. Callers handle it; no user sees it."""


@dataclass(frozen=True, slots=True)
class JoinedRows:
    """The N ok rows of a shard under a view. Arrays may lie in a mapped file, which must not be written to.

    Attributes:
        ids: ``shard_id/key``.
        rows_N: fields as in ``SampleRows``, and ``row``, ``mix_row`` and ``embedding_norm`` of the cache.
        encoded: uint8 [N,W] by name of the output: rows as the cache stores them.
        file: all bytes, for the stored views.
    """

    ids: pa.StringArray
    rows_N: StructuredRows
    encoded: Mapping[str, NDArray[np.uint8]]
    file: pa.Buffer

    def sample_ids(self, ordinal_N: NDArray[np.int32]) -> NDArray[np.object_]:
        return self.ids.take(pa.array(ordinal_N)).to_numpy(zero_copy_only=False)

    def teacher_columns(self, ordinal_N: NDArray[np.int32]) -> dict[str, NDArray[np.generic]]:
        """See ``SampleRows``."""
        encoded = {name: raw_NW.take(ordinal_N, axis=0) for name, raw_NW in self.encoded.items()}
        return {"norm": self.rows_N["embedding_norm"][ordinal_N], **encoded}


@dataclass(frozen=True, slots=True)
class PixelProofs:
    """Pixel digests and block means of N rows; None for the rows that are no canaries."""

    digests: list[bytes | None]
    means: list[bytes | None]


def join_rows(columns: ViewColumns, index: ShardIndex, *, where: str) -> pa.RecordBatch:
    """Joins the rows of a view with their rows of the index.

    Raises:
        CacheError: see ``check_alignment``.
    """
    check_alignment(columns, index, where=where)
    fields = {
        "row": columns.row_N,
        "content_hash": columns.content_hash_N,
        "box": columns.box_N4.astype(np.int32, copy=False),
        "flip": columns.flip_N,
        "mix_row": columns.mix_row_N,
        "mix_lambda": columns.mix_lambda_N,
        "embedding_norm": columns.embedding_norm_N,
        "offset": index.offset[index.ok],
        "size": index.size[index.ok],
        **without_domain(index.ok_targets),
        "width": index.width[index.ok],
        "height": index.height[index.ok],
        "partner": np.searchsorted(columns.row_N, columns.mix_row_N).astype(np.int32),
    }
    if (pixels := columns.pixels) is not None:
        fields |= {"pixel_offset": pixels.offset_N, "pixel_size": pixels.size_N, "pixel_hash": pixels.hash_N}
    rows_N = as_structured_rows(fields, columns.aug_params)
    batch = pa.record_batch(
        {
            "row": column_of(rows_N.view(np.uint8).reshape(len(rows_N), rows_N.itemsize)),
            "id": pa.array(index.sample_ids(index.ok), pa.string()),
            "pixel_digest": pa.array(columns.pixel_digest, pa.binary(16)),
            "pixel_mean": pa.array(columns.pixel_mean, pa.binary(192)),
            **{column_name(stored.output): stored.column for stored in columns.outputs.values()},
        }
    )
    return batch.replace_schema_metadata({"fields": json.dumps(rows_N.dtype.descr)})


def check_alignment(columns: ViewColumns, index: ShardIndex, *, where: str) -> None:
    """The cached rows are the index's ok rows: each once, in order, with the same content, mixed among themselves.

    Raises:
        CacheError: a row is missing, repeated, unknown to the index, of another image, or mixed with a row that does
            not exist; the first such row is named.
    """
    expected_N = index.row[index.ok]
    if not np.array_equal(columns.row_N, expected_N):
        raise CacheError(
            "the cached rows are not the shard's rows",
            code="cache.rows-mismatch",
            where=where,
            got=f"{len(columns.row_N)} rows: {_misplaced(columns.row_N, expected_N)}",
            expected=f"{len(expected_N)} rows, each ok row of the index once, in tar order",
            next_step="run: stillroom cache build CONFIG, into another cache.url",
        )
    wrong = np.flatnonzero(columns.content_hash_N != index.content_hash[index.ok])
    if len(wrong):
        raise CacheError(
            f"{len(wrong)} cached rows belong to other images",
            code="cache.other-images",
            where=f"{where}, {index.sample_ids(index.ok[wrong[:1]])[0]}",
            got=f"content hash {int(columns.content_hash_N[wrong[0]]):016x}",
            expected=f"{int(index.content_hash[index.ok][wrong[0]]):016x}",
            next_step="the shards changed since the cache was built; restore them or build another cache",
        )
    foreign = np.flatnonzero(~np.isin(columns.mix_row_N, expected_N))
    if len(foreign):
        raise CacheError(
            f"{len(foreign)} cached rows have mixup partners that the shard does not have",
            code="cache.foreign-partner",
            where=f"{where}, {index.sample_ids(index.ok[foreign[:1]])[0]}",
            got=f"row {columns.mix_row_N[foreign[0]]}",
            next_step="build another cache",
        )


def _misplaced(row_N: NDArray[np.int32], expected_N: NDArray[np.int32]) -> str:
    """How two unequal lists of rows differ; the first few of each kind are named."""
    rows, counts = np.unique(row_N, return_counts=True)
    kinds = {
        "missing": np.setdiff1d(expected_N, rows),
        "foreign": np.setdiff1d(rows, expected_N),
        "repeated": rows[counts > 1],
    }
    named = [f"{kind} {rows[:5].tolist()}" for kind, rows in kinds.items() if len(rows)]
    return ", ".join(named) or "the right ones in another order"


def write_joined(batch: pa.RecordBatch, path: Path) -> None:
    """Appends to a file that is empty or holds the stored views."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    data = sink.getvalue()
    with path.open("ab") as file:
        offset = file.tell().to_bytes(_OFFSET_BYTES, "little")
        file.write(data)
        file.write(offset)
        file.write(_digest(data, offset))


def _digest(data: pa.Buffer, offset: bytes) -> bytes:
    hasher = xxhash.xxh3_128(data)
    hasher.update(offset)
    return hasher.digest()


def map_joined(path: Path, *, outputs: Iterable[str]) -> JoinedRows:
    """Maps a file and reads it once except for the stored views, to compare its digest.

    Args:
        outputs: names of those to take, if the file has them.

    Raises:
        DamagedFileError: its bytes are not those that were written.
    """
    batch, file = _mapped(path)
    fields = [(name, kind, *map(tuple, shape)) for name, kind, *shape in json.loads(batch.schema.metadata[b"fields"])]
    rows_N = raw_rows(batch["row"]).reshape(-1).view(fields)
    encoded = {name: raw_rows(batch[name]) for name in outputs if name in batch.schema.names}
    return JoinedRows(batch["id"], rows_N, encoded, file)


def read_proofs(path: Path) -> PixelProofs:
    """
    Raises:
        DamagedFileError: its bytes are not those that were written.
    """
    batch, _ = _mapped(path)
    return PixelProofs(batch["pixel_digest"].to_pylist(), batch["pixel_mean"].to_pylist())


def _mapped(path: Path) -> tuple[pa.RecordBatch, pa.Buffer]:
    with pa.memory_map(str(path)) as file:
        data = file.read_buffer()
    end = data.size - _OFFSET_BYTES - _DIGEST_BYTES
    if end < 0:
        raise DamagedFileError(str(path))
    offset, digest = data[end : end + _OFFSET_BYTES].to_pybytes(), data[end + _OFFSET_BYTES :].to_pybytes()
    start = int.from_bytes(offset, "little")
    if start > end or _digest(body := data[start:end], offset) != digest:
        raise DamagedFileError(str(path))
    return pa.ipc.open_stream(body).read_next_batch(), data
