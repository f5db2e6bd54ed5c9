"""Moments of a cache: computed once for each manifest, equal to numpy's, and checked wherever they are read."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from pipeline import storage
from pipeline.cache.build.moments import MomentSums, decode_moments, encode_moments
from pipeline.cache.format import layout
from pipeline.cache.ops import moments as ops
from pipeline.cache.ops.gc import collect_garbage
from pipeline.cache.ops.inspect import inspect_cache
from pipeline.cache.ops.moments import ShardSums, compute_moments
from pipeline.cache.read.moments import find_moments, read_moments
from pipeline.cache.read.reader import open_cache
from pipeline.cache.verify import verify_cache
from pipeline.core.errors import CacheError
from pipeline.core.hashing import digest, seal
from schemas.cache_format import FileRef
from tests.errors import raises
from tests.pipeline.caches import TinyCache, build, files
from tests.pipeline.conftest import TinyConfig

NUM_ROWS = 35 * 3


def embeddings(url: str) -> NDArray[np.float64]:
    """Every embedding of every view, from the parts."""
    cache = open_cache(url)
    views = [(shard.shard_id, view) for shard in cache.shards for view in range(cache.num_views)]
    return np.concatenate([cache.view(*view).decoded("embedding") for view in views]).astype(np.float64)


def in_reverse(
    sums_of: ShardSums, items: Sequence[tuple[str, ...]]
) -> Iterator[tuple[tuple[str, ...], MomentSums | None]]:
    return ((item, sums_of(item)) for item in reversed(items))


@pytest.fixture
def with_moments(tiny_cache: TinyCache) -> TinyCache:
    compute_moments(tiny_cache.url)
    return tiny_cache


def test_moments_are_those_of_all_rows_and_views(tiny_cache: TinyCache) -> None:
    record, is_new = compute_moments(tiny_cache.url)
    cache = open_cache(tiny_cache.url)
    assert is_new
    assert find_moments(cache) == record
    expected_ND = embeddings(tiny_cache.url)
    assert record.num_rows == len(expected_ND) == NUM_ROWS
    moments = read_moments(cache, record)
    np.testing.assert_allclose(moments.mean_D, expected_ND.mean(0), rtol=1e-11)
    covariance_DD = np.cov(expected_ND, rowvar=False)
    np.testing.assert_allclose(moments.covariance_DD, covariance_DD, rtol=1e-9, atol=1e-9 * covariance_DD.max())


def test_the_record_counts_mixed_rows_and_what_is_left_out(tiny_cache: TinyCache) -> None:
    record, _ = compute_moments(tiny_cache.url)
    parts = [pq.read_table(path).to_pylist() for path in Path(tiny_cache.url).glob("parts/*/v*")]
    mixed = [row["row"] for part in parts for row in part if row["mix_row"] != row["row"]]
    manifest = open_cache(tiny_cache.url).manifest
    assert 0 < record.num_mixed == len(mixed) < record.num_rows
    assert record.skipped == manifest.skipped
    assert record.num_further == manifest.num_ok


def test_tasks_in_any_order_give_the_same_bytes(tiny_cache: TinyCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "SHARDS_PER_TASK", 1)
    record, _ = compute_moments(tiny_cache.url)
    for path in Path(tiny_cache.url, "moments").iterdir():
        path.unlink()
    again, is_new = compute_moments(tiny_cache.url, in_reverse)
    assert is_new
    assert again == record


def test_a_second_call_computes_nothing(with_moments: TinyCache) -> None:
    before = files(with_moments.url)

    def refuse(shard_ids: tuple[str, ...]) -> None:
        raise AssertionError(shard_ids)

    _, is_new = compute_moments(with_moments.url, lambda _, items: [(item, refuse(item)) for item in items])
    assert not is_new
    assert files(with_moments.url) == before


def test_the_record_of_a_faster_process_stands(tiny_cache: TinyCache) -> None:
    def run(
        sums_of: ShardSums, items: Sequence[tuple[str, ...]]
    ) -> Iterator[tuple[tuple[str, ...], MomentSums | None]]:
        yield from in_reverse(sums_of, items)
        compute_moments(tiny_cache.url)
        forge(tiny_cache.url, "mean")

    record, is_new = compute_moments(tiny_cache.url, run)
    assert not is_new
    assert find_moments(open_cache(tiny_cache.url)) == record
    assert Path(tiny_cache.url, record.table.path).exists()


def test_a_cache_without_embeddings_is_refused(tiny_config: TinyConfig) -> None:
    config = tiny_config(cache={"embeddings": "none", "class_means": "none"})
    build(config)
    assert config.cache is not None
    with raises("cache.no-embeddings", CacheError):
        compute_moments(config.cache.url)


def test_moments_are_of_one_state_of_a_cache(with_moments: TinyCache, tiny_config: TinyConfig) -> None:
    pinned = open_cache(with_moments.url)
    former = find_moments(pinned)
    assert former is not None
    build(tiny_config(views={"count": 4}))
    assert find_moments(open_cache(with_moments.url)) is None
    assert find_moments(pinned) == former
    record, is_new = compute_moments(with_moments.url)
    assert is_new
    assert record.num_rows == 35 * 4
    assert verify_cache(with_moments.url).problems == []


def test_a_copied_record_is_refused(with_moments: TinyCache, tiny_config: TinyConfig) -> None:
    folder = Path(with_moments.url, "moments")
    record = next(folder.glob("*.json"))
    build(tiny_config(views={"count": 4}))
    manifest_sha256 = digest(open_cache(with_moments.url).manifest_bytes)
    record.rename(Path(with_moments.url, layout.moments_path(manifest_sha256)))
    with raises("cache.other-moments", CacheError):
        find_moments(open_cache(with_moments.url))
    assert not verify_cache(with_moments.url).ok


@pytest.mark.parametrize(("pattern", "code"), [("*.json", "cache.record-changed"), ("*.parquet", "cache.changed-file")])
@pytest.mark.parametrize("at", [0, 60, -1])
def test_a_flipped_bit_is_found_by_readers_and_by_verify(
    with_moments: TinyCache, pattern: str, code: str, at: int
) -> None:
    path = next(Path(with_moments.url, "moments").glob(pattern))
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1
    path.write_bytes(damaged)
    cache = open_cache(with_moments.url)
    with raises(code, CacheError):
        record = find_moments(cache)
        assert record is not None
        read_moments(cache, record)
    report = verify_cache(with_moments.url)
    assert [problem.code for problem in report.problems] == [code]
    assert report.num_unnamed == (1 if pattern == "*.json" else 0)


def test_verify_counts_intact_moments(with_moments: TinyCache) -> None:
    report = verify_cache(with_moments.url)
    assert report.problems == []
    assert report.checked["moments"] == 1
    assert report.not_checked == {}
    assert report.num_unnamed == 0


def forge(url: str, change: str) -> None:
    """Replaces the moments by wrong ones under right digests."""
    cache = open_cache(url)
    record = find_moments(cache)
    assert record is not None
    moments = read_moments(cache, record)
    num_rows, mean_D, covariance_DD = record.num_rows, moments.mean_D.copy(), moments.covariance_DD.copy()
    match change:
        case "mean":
            mean_D[2] += 0.001 * np.sqrt(covariance_DD.trace())
        case "variance":
            covariance_DD[1, 1] += 1e-4 * covariance_DD.trace()
        case "covariance":
            covariance_DD[0, 1] += 1e-4 * covariance_DD.trace()
            covariance_DD[1, 0] = covariance_DD[0, 1]
        case "asymmetric":
            covariance_DD[0, 1] += 1
        case "infinite":
            covariance_DD[0, 0] = np.inf
        case "width":
            mean_D, covariance_DD = mean_D[1:], covariance_DD[1:, 1:]
        case _:
            num_rows += 1
    sums = MomentSums(num_rows, 0, mean_D, covariance_DD * (num_rows - 1))
    data = encode_moments(sums, where="here")
    sha256 = digest(data)
    path = layout.moments_table_path(record.manifest_sha256, sha256)
    storage.write(storage.join(url, path), data)
    table = FileRef(path=path, sha256=sha256, size_bytes=len(data))
    forged = record.model_copy(update={"table": table, "num_rows": num_rows})
    storage.write(storage.join(url, layout.moments_path(record.manifest_sha256)), seal(forged.model_dump(mode="json")))


@pytest.mark.parametrize(
    "change", ["mean", "variance", "covariance", "asymmetric", "infinite", "width", "number of rows"]
)
def test_wrong_moments_under_right_digests_are_found(with_moments: TinyCache, change: str) -> None:
    forge(with_moments.url, change)
    report = verify_cache(with_moments.url)
    assert report.num_problems == 1
    assert report.problems[0].file.startswith("moments/")
    # The table of the true moments.
    assert report.num_unnamed == (0 if change == "number of rows" else 1)


def test_moments_of_another_width_are_refused(with_moments: TinyCache) -> None:
    forge(with_moments.url, "width")
    cache = open_cache(with_moments.url)
    record = find_moments(cache)
    assert record is not None
    with raises("cache.invalid-moments", CacheError):
        read_moments(cache, record)


@pytest.mark.parametrize("columns", [{"mean": [1.0, 2.0]}, {"mean": [1.0, 2.0], "covariance": [1.0, 2.0]}])
def test_a_table_of_other_columns_is_refused(columns: dict[str, list[float]]) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    with raises("cache.invalid-moments", CacheError):
        decode_moments(sink.getvalue(), where="here")


def test_inspect_shows_them(tiny_cache: TinyCache) -> None:
    assert inspect_cache(tiny_cache.url).moments is None
    record, _ = compute_moments(tiny_cache.url)
    shown = inspect_cache(tiny_cache.url).moments
    assert shown is not None
    assert {str(record.num_rows), str(record.num_mixed)} <= {*shown.replace(",", "").split()}


def test_gc_removes_unnamed_tables_and_with_former_those_of_older_manifests(
    with_moments: TinyCache, tiny_config: TinyConfig
) -> None:
    unnamed = "moments/0123456789abcdef.0123456789abcdef.parquet"
    Path(with_moments.url, unnamed).write_bytes(b"12345")
    former = {path for path in files(with_moments.url) if path.startswith("moments/")} - {unnamed}

    def collect(*, former: bool) -> tuple[str, ...]:
        later_s = time.time() + 7200
        return collect_garbage(with_moments.url, min_age_s=3600, former=former, now_s=later_s).removed

    assert collect(former=False) == (unnamed,)
    assert collect(former=True) == ()
    build(tiny_config(views={"count": 4}))
    compute_moments(with_moments.url)
    current = {path for path in files(with_moments.url) if path.startswith("moments/")} - former
    assert collect(former=False) == ()
    removed = collect(former=True)
    assert former <= {*removed}
    assert not current & {*removed}
    assert find_moments(open_cache(with_moments.url)) is not None


def test_gc_stops_at_a_damaged_record(with_moments: TinyCache) -> None:
    next(Path(with_moments.url, "moments").glob("*.json")).write_bytes(b"damaged")
    with raises("cache.record-changed", CacheError):
        collect_garbage(with_moments.url, min_age_s=0, now_s=time.time() + 7200)
