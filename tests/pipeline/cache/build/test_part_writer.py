"""A part is view-major, and reading a view needs the bytes of this view and the footer alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.cache.build.part_writer import PartWriter, view_ranges
from pipeline.cache.format.codec import encode, stored_outputs
from pipeline.cache.read.reader import open_cache
from pipeline.tasks import OutputSpec
from schemas.cache_format import ViewRange, part_schema
from tests.pipeline.caches import TinyCache, read_commits

(LOGITS,) = stored_outputs([OutputSpec("logits", (4,), "fp32")])
SCHEMA = part_schema({"logits": 16})
ROWS, VIEWS, GROUP = 700, (3, 4), 100


def batch(view: int, start: int) -> pa.RecordBatch:
    row_N = np.arange(start, start + GROUP, dtype=np.int32)
    columns = {field.name: np.zeros(GROUP) for field in SCHEMA}
    columns |= {
        "row": row_N,
        "view": np.full(GROUP, view),
        "pixel_digest": [None] * GROUP,
        "pixel_mean": [None] * GROUP,
    }
    logits_NK = (np.outer(row_N, np.ones(4)) + view / 10).astype(np.float32)
    arrays = [
        encode(logits_NK, LOGITS) if field.name == "logits" else pa.array(columns[field.name], field.type, safe=False)
        for field in SCHEMA
    ]
    return pa.record_batch(arrays, schema=SCHEMA)


def write_part(folder: Path, *, row_size_bytes: int) -> Path:
    with PartWriter(folder, VIEWS, SCHEMA, row_size_bytes=row_size_bytes) as writer:
        for start in range(0, ROWS, GROUP):
            for view in VIEWS:
                writer.add(view, batch(view, start))
        return writer.close()


# A row size beyond the budget of a row group gives the smallest row groups, of 256 rows.
SIZES = pytest.mark.parametrize(("row_size_bytes", "groups_per_view"), [(1 << 30, 4), (16, 1)])


@SIZES
def test_rows_are_view_major_and_row_groups_never_span_views(
    tmp_path: Path, row_size_bytes: int, groups_per_view: int
) -> None:
    file = pq.ParquetFile(write_part(tmp_path, row_size_bytes=row_size_bytes))
    groups = [file.read_row_group(number, columns=["view", "row"]) for number in range(file.num_row_groups)]
    assert [set(group["view"].to_pylist()) for group in groups] == [{3}] * groups_per_view + [{4}] * groups_per_view
    rows = [row for group in groups for row in group["row"].to_pylist()]
    assert rows == [*range(ROWS), *range(ROWS)]


@SIZES
def test_ranges_follow_each_other_from_the_magic_to_the_footer(
    tmp_path: Path, row_size_bytes: int, groups_per_view: int
) -> None:
    path = write_part(tmp_path, row_size_bytes=row_size_bytes)
    data = path.read_bytes()
    ranges, footer = view_ranges(path, dict.fromkeys(VIEWS, ROWS))
    assert [(view.view, view.rows) for view in ranges] == [(3, ROWS), (4, ROWS)]
    assert ranges[0].offset == 4
    assert ranges[0].offset + ranges[0].size_bytes == ranges[1].offset
    assert ranges[1].offset + ranges[1].size_bytes == footer.offset
    assert footer.offset + footer.size_bytes == len(data)
    # A Parquet file ends with the length of its footer and the magic.
    assert footer.size_bytes == int.from_bytes(data[-8:-4], "little") + 8
    for item in (*ranges, footer):
        chunk = data[item.offset : item.offset + item.size_bytes]
        assert hashlib.sha256(chunk).hexdigest() == item.digest
    assert pq.read_metadata(path).num_row_groups == 2 * groups_per_view


def test_row_groups_of_maps_stay_within_their_bytes(tmp_path: Path) -> None:
    """Maps of 3 MiB: ten rows in a group of 32 MiB; rows that arrive together are split."""
    size_bytes, rows = 3 << 20, 23
    schema = pa.schema([pa.field("row", pa.int32()), pa.field("logits", pa.binary(size_bytes))])
    cells = pa.array([bytes([row]) * size_bytes for row in range(rows)], pa.binary(size_bytes))
    with PartWriter(tmp_path, [0], schema, row_size_bytes=size_bytes, has_maps=True) as writer:
        writer.add(0, pa.record_batch([pa.array(range(rows), pa.int32()), cells], schema=schema))
        path = writer.close()
    file = pq.ParquetFile(path)
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    assert [group.num_rows for group in groups] == [10, 10, 3]
    assert [group.column(1).total_uncompressed_size // size_bytes for group in groups] == [10, 10, 3]
    assert file.read()["logits"].to_pylist() == cells.to_pylist()


def test_any_parquet_reader_reads_a_part(tmp_path: Path) -> None:
    table = pq.read_table(write_part(tmp_path, row_size_bytes=1 << 30))
    assert table.schema.equals(SCHEMA)
    assert np.frombuffer(table["logits"][ROWS + 5].as_py(), "<f4").tolist() == [np.float32(5.4)] * 4


def test_leaving_the_writer_removes_the_spilled_rows(tmp_path: Path) -> None:
    def fail() -> None:
        with PartWriter(tmp_path, VIEWS, SCHEMA, row_size_bytes=16) as writer:
            writer.add(3, batch(3, 0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_reading_a_view_needs_its_bytes_and_the_footer_alone(tiny_cache: TinyCache) -> None:
    expected = open_cache(tiny_cache.url).view("digits-00", 1)
    commit = next(commit for commit in read_commits(tiny_cache.url) if commit.block.name == "v0000-0001")
    url = storage.join(tiny_cache.url, commit.part.path)
    _destroy_all_but(Path(url), commit.views[1], commit.footer.offset)
    columns = open_cache(tiny_cache.url).view("digits-00", 1)
    assert np.array_equal(columns.decoded("logits"), expected.decoded("logits"))
    assert np.array_equal(columns.box_N4, expected.box_N4)
    assert columns.pixel_digest == expected.pixel_digest


def test_a_view_costs_two_range_reads(tiny_cache: TinyCache, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = next(commit for commit in read_commits(tiny_cache.url) if commit.block.name == "v0000-0001")
    reads: list[tuple[int, int]] = []
    real = storage.read_range

    def counted(url: str, offset: int, size_bytes: int) -> bytes:
        reads.append((offset, size_bytes))
        return real(url, offset, size_bytes)

    cache = open_cache(tiny_cache.url)
    monkeypatch.setattr(storage, "read_range", counted)
    cache.view("digits-00", 1)
    view, footer = commit.views[1], commit.footer
    assert reads == [(footer.offset, footer.size_bytes), (view.offset, view.size_bytes)]


def test_the_name_of_a_part_has_the_hash_of_its_content(built_cache: TinyCache) -> None:
    commits = read_commits(built_cache.url)
    assert len(commits) == 6
    for commit in commits:
        for ref in (commit.part, commit.means):
            if ref is not None:
                data = storage.read(storage.join(built_cache.url, ref.path))
                assert hashlib.sha256(data).hexdigest() == ref.sha256
                assert len(data) == ref.size_bytes
                assert ref.path.endswith(f"/{commit.block.name}.{ref.sha256[:16]}.parquet")


def _destroy_all_but(path: Path, view: ViewRange, footer_offset: int) -> None:
    data = bytearray(path.read_bytes())
    end = view.offset + view.size_bytes
    data[: view.offset] = bytes([0xFF]) * view.offset
    data[end:footer_offset] = bytes([0xFF]) * (footer_offset - end)
    path.write_bytes(data)


def _pages(chunk: bytes) -> list[int]:
    """Bytes of the pages of a column chunk without statistics: Thrift's compact protocol, as in parquet.thrift."""
    sizes, at = list[int](), 0

    def number() -> int:
        """The next field, an int32: its header, then a zigzag varint."""
        nonlocal at
        assert chunk[at] == 0x15
        value = shift = 0
        while True:
            at += 1
            value |= (chunk[at] & 0x7F) << shift
            shift += 7
            if chunk[at] < 0x80:
                at += 1
                return value >> 1 ^ -(value & 1)

    while at < len(chunk):
        kind, _, compressed = number(), number(), number()
        assert kind == 0, "a page of data"
        assert chunk[at] == 0x2C
        at += 1
        rows, encoding, _, _ = number(), number(), number(), number()
        # Empty statistics; the ends of three structures.
        assert (encoding, chunk[at : at + 4]) == (0, b"\x1c\0\0\0"), "plain"
        assert rows
        at += 4 + compressed
        sizes.append(compressed)
    assert at == len(chunk)
    return sizes


@pytest.mark.parametrize("pixels", [pa.large_binary(), pa.binary(3 * 224 * 224)])
def test_pages_and_row_groups_of_stored_views_are_bounded_by_bytes(tmp_path: Path, pixels: pa.DataType) -> None:
    """300 rows that no page or row group of a part without pixels would separate."""
    schema, rng = part_schema({"logits": 16}, {}, pixels), np.random.default_rng(0)
    largest = pixels.byte_width if pa.types.is_fixed_size_binary(pixels) else 200_000
    sizes = np.full(300, largest) if pixels != pa.large_binary() else rng.integers(1, largest, 300)
    views = [rng.bytes(size) for size in sizes.tolist()]
    columns: dict[str, pa.Array] = {}
    for field in schema:
        empty = [None] * 300 if field.nullable else [b"0" * 16 if field.name == "logits" else 0] * 300
        values = {"pixels": views, "flip": [False] * 300, "row": range(300)}.get(field.name, empty)
        columns[field.name] = pa.array(values, field.type)
    with PartWriter(tmp_path, [0], schema, row_size_bytes=16) as writer:
        writer.add(0, pa.record_batch(columns, schema=schema))
        part = writer.close()
    metadata, data = pq.read_metadata(part), part.read_bytes()
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    assert len(groups) > 1 or sizes.sum() < 32 << 20
    stored = [group.column(schema.get_field_index("pixels")) for group in groups]
    for chunk in stored:
        assert (chunk.compression, chunk.has_dictionary_page, chunk.is_stats_set) == ("UNCOMPRESSED", False, False)
        assert chunk.total_compressed_size <= (32 << 20) * 1.1
        start = chunk.data_page_offset
        pages = _pages(data[start : start + chunk.total_compressed_size])
        assert len(pages) > 1
        assert max(pages) <= 1 << 20
    assert pq.read_table(part)["pixels"].to_pylist() == views
