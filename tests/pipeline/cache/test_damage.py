"""A reader of a file of a cache finds any flipped bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.cache.build.manifest import publish_manifest
from pipeline.cache.read.reader import open_cache
from pipeline.core.errors import CacheError
from tests.pipeline.caches import TinyCache, build, files, read_commits, shard_urls


def read_everything(url: str) -> None:
    """Everything that a training run reads, and that a resumed build reads."""
    cache = open_cache(url)
    cache.class_means()
    for shard in cache.shards:
        cache.index(shard)
        for view in (*range(cache.num_views), 65_535):
            cache.view(shard.shard_id, view)
    read_commits(url)


def test_an_undamaged_cache_reads(built_cache: TinyCache) -> None:
    read_everything(built_cache.url)


@pytest.mark.slow
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_bit_is_found_wherever_it_is(tiny_cache: TinyCache, data: st.DataObject) -> None:
    # Class sums are read when a manifest is published, and have a separate test.
    paths = [path for path in files(tiny_cache.url) if not path.startswith("means/")]
    path = Path(tiny_cache.url, data.draw(st.sampled_from(paths)))
    intact = path.read_bytes()
    # The magic before the first view is all of a cache that no digest covers: it is never read.
    first = 4 if path.parts[-3] == "parts" else 0
    at = data.draw(st.integers(first, len(intact) - 1))
    damaged = bytearray(intact)
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(damaged)
    try:
        with pytest.raises(CacheError):
            read_everything(tiny_cache.url)
    finally:
        path.write_bytes(intact)


@pytest.mark.parametrize("at", [0, 100, -1])
def test_a_flipped_bit_in_class_sums_is_found_when_they_are_merged(tiny_cache: TinyCache, at: int) -> None:
    path = next(Path(tiny_cache.url, "means/digits-01").iterdir())
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CacheError, match=r"cache\.changed-file"):
        publish_manifest(tiny_cache.url, shard_urls(tiny_cache.config))


def test_a_truncated_part_is_found(tiny_cache: TinyCache) -> None:
    path = next(Path(tiny_cache.url, "parts/digits-01").glob("v0002*"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CacheError, match=r"cache\.truncated-part[\s\S]*remove this file and run"):
        open_cache(tiny_cache.url).view("digits-01", 2)


@pytest.mark.parametrize(
    "pattern",
    ["header.json", "class_means.parquet", "manifest/parts.parquet", "index/digits-01.parquet", "parts/*1/v0002*"],
)
def test_a_missing_file_is_named_with_the_remedy(tiny_cache: TinyCache, pattern: str) -> None:
    path = next(Path(tiny_cache.url).glob(pattern))
    path.unlink()
    with pytest.raises(CacheError, match=rf"cache\.missing-file[\s\S]*{path.name}[\s\S]*run: stillroom cache build"):
        read_everything(tiny_cache.url)


@pytest.mark.parametrize("pattern", ["class_means.parquet", "index/digits-01.parquet", "parts/*1/v0002*"])
def test_a_damaged_file_is_found_with_the_remedy(tiny_cache: TinyCache, pattern: str) -> None:
    path = next(Path(tiny_cache.url).glob(pattern))
    path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(CacheError, match=r"cache\.changed-file[\s\S]*remove this file and run: stillroom"):
        read_everything(tiny_cache.url)


@pytest.mark.parametrize("path", ["manifest/parts.parquet", "manifest/shards.parquet", "class_means.parquet"])
def test_publishing_again_repairs_a_damaged_table(tiny_cache: TinyCache, path: str) -> None:
    before = files(tiny_cache.url)
    Path(tiny_cache.url, path).write_bytes(b"damaged")
    build(tiny_cache.config)
    assert {name: data for name, data in files(tiny_cache.url).items() if name in before} == before


def test_a_header_that_is_not_that_of_the_manifest_is_refused(tiny_cache: TinyCache, built_cache: TinyCache) -> None:
    header = Path(tiny_cache.url, "header.json")
    header.write_bytes(Path(built_cache.url, "header.json").read_bytes() + b"\n")
    with pytest.raises(CacheError, match=r"cache\.header-not-of-manifest"):
        open_cache(tiny_cache.url)
