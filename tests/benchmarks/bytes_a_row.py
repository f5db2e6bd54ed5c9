"""``python -m tests.benchmarks bytes_a_row``: bytes and microseconds a row of real parts, by encoding."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.cache.build.part_writer import PartWriter, parquet_settings, view_ranges
from pipeline.cache.format.codec import RowIdentity, decode, encode, row_bytes, stored_outputs
from pipeline.tasks import OutputSpec
from schemas.cache_format import Output, part_schema
from tests.benchmarks.teachers import BENCH, ten_classes, thousand_classes
from tests.pipeline.caches import read_commits

_GROUP, _ROUNDS = 256, 3
_STAGES = ("encode", "write", "hash", "read", "decode")
_BESIDES: dict[str, dict[str, Any]] = {
    "none": {"compression": "none", "compression_level": None},
    "lz4": {"compression": "lz4", "compression_level": None},
    "zstd 1": {"compression_level": 1},
    "zstd 9": {"compression_level": 9},
    "split, zstd 3": {"column_encoding": {"logits": "BYTE_STREAM_SPLIT"}},
}


def _seconds(work: Callable[[], object]) -> float:
    """Processor time of the fastest of a few rounds."""
    taken: list[float] = []
    for _ in range(_ROUNDS):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return min(taken)


def _encode(logits_NK: NDArray[np.float32], start: int, output: Output) -> pa.Array:
    group_NK = logits_NK[start : start + _GROUP]
    identity = RowIdentity([f"shard/{start + row}" for row in range(len(group_NK))], 0)
    return encode(group_NK, output, identity=identity)


def _batches(rows: pa.Table, logits_NK: NDArray[np.float32], output: Output) -> list[pa.RecordBatch]:
    """Rows of a real part with re-encoded logits, as the groups of a build."""
    schema = part_schema({"logits": row_bytes(output)})
    batches: list[pa.RecordBatch] = []
    for start in range(0, rows.num_rows, _GROUP):
        columns = {name: rows[name].slice(start, _GROUP).combine_chunks() for name in rows.column_names}
        columns["logits"] = _encode(logits_NK, start, output)
        batches.append(pa.record_batch([columns[field.name] for field in schema], schema=schema))
    return batches


def _write(batches: list[pa.RecordBatch], folder: Path) -> Path:
    with PartWriter(folder, [0], batches[0].schema, row_size_bytes=batches[0]["logits"].type.byte_width) as writer:
        for batch in batches:
            writer.add(0, batch)
        return writer.close()


def _stored(path: Path, column: str) -> int:
    metadata = pq.read_metadata(path)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    return sum(one.total_compressed_size for one in columns if one.path_in_schema == column)


def _other_settings(batches: list[pa.RecordBatch], path: Path) -> str:
    """Bytes a row of the logits alone, and microseconds to write them, under other settings."""
    table = pa.Table.from_batches(batches).select(["logits"])
    found: list[str] = []
    for name, changes in _BESIDES.items():
        settings = {**parquet_settings(table.schema), "column_encoding": None, **changes}

        def write(settings: dict[str, Any] = settings) -> None:
            with pq.ParquetWriter(path, table.schema, **settings) as writer:
                writer.write_table(table)

        micros = _seconds(write) / table.num_rows * 1e6
        found.append(f"{name} {_stored(path, 'logits') / table.num_rows:.1f} B {micros:.1f} us")
    return "; ".join(found)


def _report(rows: pa.Table, logits_NK: NDArray[np.float32], kind: str) -> None:
    (output,) = stored_outputs([OutputSpec("logits", (logits_NK.shape[1],), kind)])
    num_rows = len(logits_NK)
    batches = _batches(rows, logits_NK, output)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = _write(batches, folder)

        def digests() -> None:
            view_ranges(path, {0: num_rows})
            hashlib.sha256(path.read_bytes()).hexdigest()

        stages = {
            "encode": lambda: [_encode(logits_NK, start, output) for start in range(0, num_rows, _GROUP)],
            "write": lambda: _write(batches, folder),
            "hash": digests,
            "read": lambda: pq.read_table(path, use_threads=False),
            "decode": lambda: decode(batches[0]["logits"], output, temperature=3.0),
        }
        micros = {stage: _seconds(work) / num_rows * 1e6 for stage, work in stages.items()}
        micros["decode"] *= num_rows / batches[0].num_rows
        whole, logits = path.stat().st_size / num_rows, _stored(path, "logits") / num_rows
        raw = batches[0]["logits"].type.byte_width
        times = "".join(f"{value:>8.2f}" for value in micros.values())
        print(f"    {kind:<9}{raw:>6}{logits:>9.1f}{whole:>9.1f}{times}", flush=True)
        print(f"      {_other_settings(batches, folder / 'other.parquet')}", flush=True)


def run() -> None:
    titles = "".join(f"{stage:>8}" for stage in _STAGES)
    for teacher, kinds in (
        (ten_classes(), ("fp32", "fp16", "int8", "topk:4")),
        (thousand_classes(), ("fp32", "fp16", "int8", "int8t", "int4", "topk:10", "topk:100", "sampled:21@3")),
    ):
        logits_NK = teacher.logits("mixed")
        url = BENCH / f"{teacher.name}-mixed"
        parts = [pq.read_table(url / commit.part.path) for commit in read_commits(str(url))]
        rows = pa.concat_tables(parts)
        print(f"  {teacher.name}, {len(logits_NK)} mixed rows; bytes of logits raw and stored, of a part, and us a row")
        print(f"    {'':<9}{'raw':>6}{'stored':>9}{'part':>9}{titles}")
        for kind in kinds:
            _report(rows, logits_NK, kind)
