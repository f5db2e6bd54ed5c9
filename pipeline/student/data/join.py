"""One view of one shard, joined with the shard's index: a file that every loader process of a node maps.

An Arrow stream of one uncompressed batch, and after its end the XXH3-128 of all before. Mapped columns are the arrays
themselves: nothing is decoded or copied when a process opens the file, and all processes share its pages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from pipeline.cache.format.codec import column_of, raw_rows
from pipeline.cache.read.reader import StoredRows, ViewColumns
from pipeline.core.errors import CacheError
from pipeline.shards.index import ShardIndex
from pipeline.student.data.rows import StructuredRows, as_structured_rows, drawn_fields
from schemas.cache_format import Output

VERSION = 2
"""Of the form below: a file of another one has another name."""

_DIGEST_BYTES = 16
_STORED = ("logits", "embedding")


class DamagedFileError(Exception):
    """The bytes are not those that were written; never seen by a user."""


@dataclass(frozen=True, slots=True)
class JoinedRows:
    """The N ok rows of a shard under a view. Arrays may lie in a mapped file, and are not to be written to."""

    columns: ViewColumns
    ids: pa.StringArray
    """``shard_id/key``."""
    rows_N: StructuredRows
    """As ``SampleRows`` has them, and ``row``, ``mix_row`` and ``embedding_norm`` of ``columns``."""

    def __len__(self) -> int:
        return len(self.rows_N)

    def sample_ids(self, ordinal_N: NDArray[np.int32]) -> list[str]:
        return self.ids.take(pa.array(ordinal_N)).to_pylist()


def join_rows(columns: ViewColumns, index: ShardIndex, *, where: str) -> JoinedRows:
    """Rows of a view beside their rows of the index.

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
        "label": index.label[index.ok],
        "width": index.width[index.ok],
        "height": index.height[index.ok],
        "partner": np.searchsorted(columns.row_N, columns.mix_row_N).astype(np.int32),
    }
    rows_N = as_structured_rows(fields, columns.drawn)
    return JoinedRows(columns, pa.array(index.sample_ids(index.ok), pa.string()), rows_N)


def check_alignment(columns: ViewColumns, index: ShardIndex, *, where: str) -> None:
    """The cached rows are the index's ok rows: each once, in order, with the same content, mixed among themselves.

    Raises:
        CacheError: a row is missing, repeated, foreign, of another image, or mixed with a row that is none of these;
            the first such row is named.
    """
    expected_N = index.row[index.ok]
    if not np.array_equal(columns.row_N, expected_N):
        raise CacheError(
            "the cached rows are not the shard's rows",
            where=where,
            got=f"{len(columns.row_N)} rows: {_misplaced(columns.row_N, expected_N)}",
            expected=f"{len(expected_N)} rows, each ok row of the index once, in tar order",
            next_step="run: stillroom cache build CONFIG, into another cache.url",
        )
    wrong = np.flatnonzero(columns.content_hash_N != index.content_hash[index.ok])
    if len(wrong):
        raise CacheError(
            f"{len(wrong)} cached rows are of other images",
            where=f"{where}, {index.sample_ids(index.ok[wrong[:1]])[0]}",
            got=f"content hash {int(columns.content_hash_N[wrong[0]]):016x}",
            expected=f"{int(index.content_hash[index.ok][wrong[0]]):016x}",
            next_step="the shards changed since the cache was built; restore them or build another cache",
        )
    foreign = np.flatnonzero(~np.isin(columns.mix_row_N, expected_N))
    if len(foreign):
        raise CacheError(
            f"{len(foreign)} cached rows are mixed with rows that the shard does not have",
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
    told = [f"{kind} {found[:5].tolist()}" for kind, found in kinds.items() if len(found)]
    return ", ".join(told) or "the right ones in another order"


def write_joined(rows: JoinedRows, path: Path) -> None:
    """Fills a file, in place."""
    batch = _to_batch(rows)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    data = sink.getvalue()
    with path.open("wb") as file:
        file.write(data)
        file.write(xxhash.xxh3_128_digest(data))


def map_joined(path: Path, outputs: Sequence[Output]) -> JoinedRows:
    """Maps a file and reads it once, to compare its digest. Pixel proofs stay unread; see ``with_proofs``.

    Args:
        outputs: of the cache that the view is of.

    Raises:
        DamagedFileError: its bytes are not those that were written.
    """
    return _from_batch(_mapped(path), {output.name: output for output in outputs})


def with_proofs(columns: ViewColumns, path: Path) -> ViewColumns:
    """The same columns with the pixel digests and means of the rows that have any."""
    batch = _mapped(path)
    digests, means = (tuple(batch[name].to_pylist()) for name in ("pixel_digest", "pixel_mean"))
    return replace(columns, pixel_digest=digests, pixel_mean=means)


def _mapped(path: Path) -> pa.RecordBatch:
    with pa.memory_map(str(path)) as file:
        data = file.read_buffer()
    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if len(digest) < _DIGEST_BYTES or xxhash.xxh3_128_digest(body) != digest.to_pybytes():
        raise DamagedFileError(str(path))
    return pa.ipc.open_stream(body).read_next_batch()


def _to_batch(rows: JoinedRows) -> pa.RecordBatch:
    columns = rows.columns
    rows_NW = rows.rows_N.view(np.uint8).reshape(len(rows), rows.rows_N.itemsize)
    stored = dict(zip(_STORED, (columns.logits, columns.embedding), strict=True))
    batch = pa.record_batch(
        {
            "record": column_of(rows_NW),
            "id": rows.ids,
            "pixel_digest": pa.array(columns.pixel_digest, pa.binary(16)),
            "pixel_mean": pa.array(columns.pixel_mean, pa.binary(192)),
            **{name: found.column for name, found in stored.items() if found is not None},
        }
    )
    return batch.replace_schema_metadata({"fields": json.dumps(rows.rows_N.dtype.descr)})


def _from_batch(batch: pa.RecordBatch, outputs: Mapping[str, Output]) -> JoinedRows:
    fields = [(name, kind, *map(tuple, shape)) for name, kind, *shape in json.loads(batch.schema.metadata[b"fields"])]
    rows_N = raw_rows(batch["record"]).reshape(-1).view(fields)
    stored = {name: StoredRows(batch[name], outputs[name]) if name in outputs else None for name in _STORED}
    columns = ViewColumns(
        row_N=rows_N["row"],
        content_hash_N=rows_N["content_hash"],
        box_N4=rows_N["box"],
        flip_N=rows_N["flip"],
        mix_row_N=rows_N["mix_row"],
        mix_lambda_N=rows_N["mix_lambda"],
        drawn=drawn_fields(rows_N),
        embedding_norm_N=rows_N["embedding_norm"],
        logits=stored["logits"],
        embedding=stored["embedding"],
        pixel_digest=(),
        pixel_mean=(),
    )
    return JoinedRows(columns, batch["id"], rows_N)
