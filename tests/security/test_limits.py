"""Files of a cache, a run or an index folder that would fill the memory of a reader are refused unread."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.pack_shards import pack
from pipeline.cache.format import layout
from pipeline.cache.format.header import read_header
from pipeline.cache.ops.inspect import inspect_cache
from pipeline.cache.read.reader import open_cache
from pipeline.cache.verify import verify_cache
from pipeline.core.errors import CacheError, InputError
from pipeline.core.hashing import digest
from pipeline.shards.index import decode_index
from pipeline.shards.pack_plan import PackSettings
from pipeline.student.run import checkpoint
from schemas.cache_format import index_schema
from tests.errors import raises
from tests.pipeline.caches import TinyCache, read_commits
from tests.security.test_caches import change_record

HUGE_BYTES = 100 << 30


def make_huge(path: Path) -> None:
    """Zeros that take no disk space: reading them would fill the memory."""
    with path.open("wb") as file:
        file.truncate(HUGE_BYTES)


@pytest.mark.parametrize(
    ("path", "read"),
    [
        (layout.MANIFEST, open_cache),
        (layout.MANIFEST, inspect_cache),
        (layout.HEADER, open_cache),
        (layout.HEADER, read_header),
        (layout.SHARDS, lambda url: open_cache(url).shards),
        (layout.PARTS, lambda url: open_cache(url).view("digits-00", 0)),
        (layout.index_path("digits-00"), lambda url: open_cache(url).index(open_cache(url).shards[0])),
        ("commits/digits-00/v0000-0000.json", read_commits),
    ],
)
def test_no_oversized_file_of_a_cache_is_read(path: str, read: Callable[[str], object], tiny_cache: TinyCache) -> None:
    file = Path(tiny_cache.url, path)
    if path.startswith("commits/"):
        file = sorted(file.parent.glob("v*.json"))[0]
    assert file.is_file()
    make_huge(file)
    with raises("storage.too-large", InputError, got=f"{HUGE_BYTES} bytes"):
        read(tiny_cache.url)
    assert not verify_cache(tiny_cache.url).ok


@pytest.mark.parametrize("name", [checkpoint.CONFIG, checkpoint.SUMMARY, checkpoint.MANIFEST])
def test_no_oversized_record_of_a_run_is_read(name: str, tmp_path: Path) -> None:
    make_huge(tmp_path / name)
    read = {
        checkpoint.CONFIG: checkpoint.read_config,
        checkpoint.SUMMARY: checkpoint.read_summary,
        checkpoint.MANIFEST: lambda url: checkpoint.pinned_manifests(url, 1),
    }[name]
    with raises("storage.too-large", InputError):
        read(str(tmp_path))


def test_no_oversized_classes_file_is_read(tmp_path: Path) -> None:
    make_huge(tmp_path / "classes.json")
    with raises("storage.too-large", InputError):
        pack(str(tmp_path), str(tmp_path / "out"), PackSettings(), classes_url=str(tmp_path / "classes.json"))


def _endless(schema: pa.Schema, num_rows: int) -> bytes:
    """A table of a few kilobytes with this number of equal rows of long texts."""
    values = {pa.string(): ["x" * 10_000]}
    columns = [
        pa.DictionaryArray.from_arrays(np.zeros(num_rows, np.int8), pa.array(values.get(field.type, [0]), field.type))
        for field in schema
    ]
    sink = io.BytesIO()
    table = pa.table(dict(zip(schema.names, columns, strict=True)))
    pq.write_table(table, sink, compression="zstd", store_schema=False)
    return sink.getvalue()


def test_no_table_of_a_cache_that_expands_too_much_is_unpacked(tiny_cache: TinyCache) -> None:
    for name in ("shards", "parts"):
        path = Path(tiny_cache.url, f"manifest/{name}.parquet")
        data = _endless(pq.read_schema(path), 100_000)
        assert len(data) < 100_000
        path.write_bytes(data)
        ref = {"path": f"manifest/{name}.parquet", "sha256": digest(data), "size_bytes": len(data)}
        change_record(Path(tiny_cache.url, layout.MANIFEST), **{name: ref})
    for read in (lambda: open_cache(tiny_cache.url).shards, lambda: open_cache(tiny_cache.url).view("digits-00", 0)):
        with pytest.raises(CacheError) as caught:
            read()
        assert "bytes that expand to" in str(caught.value.got)
    problems = [problem.got for problem in verify_cache(tiny_cache.url).problems]
    assert any("bytes that expand to" in str(got) for got in problems), problems


def test_no_index_that_expands_too_much_is_unpacked() -> None:
    with raises("shard.index-damaged", CacheError) as caught:
        decode_index(_endless(index_schema({"label": pa.int32()}), 100_000), where="index")
    assert "bytes that expand to" in str(caught.value.got)
