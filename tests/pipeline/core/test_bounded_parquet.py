"""Parquet that expands too much is refused before it fills the memory; other Parquet is read as pyarrow reads it."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.bounded_parquet import ALWAYS_ALLOWED_BYTES, read_bounded
from tests.marks import slow


def encoded(table: pa.Table, **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", **options)  # pyright: ignore[reportArgumentType]
    return sink.getvalue()


def one_text(num_rows: int, *, size_bytes: int) -> pa.Table:
    """The same text in every row, stored once in the file."""
    indices = pa.array(np.zeros(num_rows, np.int32))
    return pa.table({"text": pa.DictionaryArray.from_arrays(indices, pa.array(["x" * size_bytes]))})


BOMBS = {
    "one text in many rows": lambda: encoded(one_text(4_000, size_bytes=1 << 20), store_schema=False),
    "one number in many rows": lambda: encoded(pa.table({"n": np.zeros(150_000_000, np.int64)})),
    "pages of zeros": lambda: encoded(pa.table({"n": np.zeros(68_000_000, np.int64)}), use_dictionary=False),
}


@pytest.mark.parametrize("name", [slow(name) if name.startswith("one number") else name for name in BOMBS])
def test_tables_that_would_fill_the_memory_are_refused_within_little_of_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.parquet"
    path.write_bytes(BOMBS[name]())
    assert path.stat().st_size < ALWAYS_ALLOWED_BYTES / 100
    script = (
        "import re, sys\n"
        "import pyarrow as pa\n"
        "from pipeline.core.bounded_parquet import read_bounded\n"
        "data = open(sys.argv[1], 'rb').read()\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
        "before = peak()\n"
        "try:\n"
        "    read_bounded(pa.BufferReader(data), size_bytes=len(data))\n"
        "except pa.ArrowInvalid as error:\n"
        "    print(error)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    message, used_kib = done.stdout.splitlines()
    assert "bytes that expand to" in message
    assert int(used_kib) < 64 * 1024


def test_a_table_is_read_as_pyarrow_reads_it() -> None:
    texts = [None, "", "a", "a", "ü" * 500, *(str(number) for number in range(3_000))]
    columns = {
        "text": pa.array(texts, pa.string()),
        "large": pa.array(texts, pa.large_string()),
        "bytes": pa.array([None if text is None else text.encode() for text in texts], pa.binary()),
        "fixed": pa.array([b"0123"] * len(texts), pa.binary(4)),
        "flag": pa.array([True, False, None] * (len(texts) // 3) + [None] * (len(texts) % 3)),
        "list": pa.array([[1.0, 2.0]] * len(texts), pa.list_(pa.float32(), 2)),
    }
    table = pa.table(columns).replace_schema_metadata({"about": "this"})
    for use_dictionary in (True, False):
        for some in (table, table.slice(0, 0)):
            data = encoded(some, row_group_size=1_000, use_dictionary=use_dictionary)
            got = read_bounded(pa.BufferReader(data), size_bytes=len(data))
            got.validate(full=True)
            assert got.equals(pq.read_table(io.BytesIO(data), use_threads=False), check_metadata=True)


def test_repeated_columns_store_each_text_once() -> None:
    data = encoded(one_text(3, size_bytes=4), store_schema=False)
    column = read_bounded(pa.BufferReader(data), size_bytes=len(data), repeated=["text"])["text"]
    assert pa.types.is_dictionary(column.type)
    assert column.to_pylist() == ["xxxx"] * 3


def test_texts_in_lists_are_refused() -> None:
    data = encoded(pa.table({"names": pa.array([["a"]], pa.list_(pa.string()))}))
    with pytest.raises(pa.ArrowInvalid, match=r"lists of strings in names\.list\.element"):
        read_bounded(pa.BufferReader(data), size_bytes=len(data))


def test_a_long_value_that_is_repeated_is_not_expanded_without_a_dictionary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The footer shows neither how often a value of a page's dictionary is repeated, nor its length."""
    path, limit = tmp_path / "bomb.parquet", 1 << 23
    monkeypatch.setattr("pipeline.core.bounded_parquet.ALWAYS_ALLOWED_BYTES", limit)
    table = pa.table({"pixels": pa.array([b"x" * 10_000] * 4_000, pa.large_binary())})
    pq.write_table(table, path, use_dictionary=True)
    size_bytes = path.stat().st_size
    assert 100 * size_bytes < 20_000_000
    allocated = pa.total_allocated_bytes()
    with pytest.raises(pa.ArrowInvalid):
        read_bounded(path, size_bytes=size_bytes, distinct=["pixels"])
    assert pa.total_allocated_bytes() - allocated < 2_000_000
