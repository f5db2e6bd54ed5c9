"""The manifest: which commits belong to a cache, where its shards are, and how it grows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import storage
from pipeline.cache.build.commit import read_commit
from pipeline.cache.build.context import prepare
from pipeline.cache.build.manifest import locate, publish_manifest, read_manifest, relative
from pipeline.cache.build.part import PartTask, build_part
from pipeline.cache.format import layout
from pipeline.cache.ops.inspect import inspect_cache
from pipeline.cache.read.reader import ViewColumns, open_cache
from pipeline.core.errors import CacheError
from pipeline.core.hashing import seal
from pipeline.shards.writer import pack_shards
from schemas.cache_format import ViewBlock
from schemas.config import Config
from tests.errors import raises
from tests.pipeline.caches import (
    TinyCache,
    build,
    cache_section,
    digit_samples,
    files,
    open_built,
    read_commits,
    shard_urls,
)
from tests.pipeline.conftest import TinyConfig


def url_of(config: Config) -> str:
    return cache_section(config).url


def test_a_missing_and_an_unfinished_cache_have_different_errors(tiny_config: TinyConfig, tmp_path: Path) -> None:
    with raises("cache.missing", CacheError):
        open_cache(str(tmp_path))
    config = tiny_config()
    prepare(config)
    with raises("cache.unfinished", CacheError):
        open_cache(url_of(config))


def test_more_views_leave_existing_files_unchanged_and_are_those_of_a_cache_built_at_once(
    tiny_cache: TinyCache, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    before = files(tiny_cache.url)
    extended = open_built(tiny_config(views={"count": 5}))
    after = files(tiny_cache.url)
    unchanged = ("header", "index/", "parts/", "means/", "commits/", "class_means")
    assert all(after[path] == data for path, data in before.items() if path.startswith(unchanged))
    assert sorted(path for path in after if path.startswith("commits/digits-00") and path not in before) == [
        "commits/digits-00/v0003-0004.json"
    ]
    # In one block of five views, which are here in three.
    at_once = open_built(tiny_config(views={"count": 5}, cache={"url": str(tmp_path / "at-once"), "views_per_part": 5}))
    assert extended.num_views == at_once.num_views == 5
    for shard in ("digits-00", "digits-01"):
        for view in range(5):
            columns, expected = extended.view(shard, view), at_once.view(shard, view)
            for name in ViewColumns.__slots__:
                got, value = getattr(columns, name), getattr(expected, name)
                assert np.array_equal(got, value) or got == value
    same = ("index/", "means/", "class_means", "header")
    blocks, block = (
        {path: data for path, data in files(cache.url).items() if path.startswith(same)}
        for cache in (extended, at_once)
    )
    assert blocks == block


def test_an_added_shard_extends_the_cache_and_its_means_and_a_run_reads_its_copy_of_the_manifest(
    tiny_config: TinyConfig, digits_shards: list[str]
) -> None:
    first = open_built(tiny_config(data={"shards": digits_shards[:1]}, views={"count": 2}))
    both = open_built(tiny_config())
    pinned = open_cache(first.url, manifest_bytes=first.manifest_bytes)
    for cache, num_shards, num_views, num_ok in ((both, 2, 3, 35), (pinned, 1, 2, 20)):
        assert (cache.manifest.num_shards, cache.num_views, cache.manifest.num_ok) == (num_shards, num_views, num_ok)
        means = cache.class_means()
        assert means is not None
        assert means.count_K.sum() == num_ok
    assert [shard.shard_id for shard in pinned.shards] == ["digits-00"]
    assert len(pinned.view("digits-00", 1).row_N) == 20
    with raises("cache.missing-view", CacheError, expected="views 0..1"):
        pinned.view("digits-00", 3)


def test_commits_of_shards_that_the_config_no_longer_names_stay_and_do_not_count(
    tiny_cache: TinyCache, tiny_config: TinyConfig, digits_shards: list[str]
) -> None:
    before = files(tiny_cache.url)
    manifest = build(tiny_config(data={"shards": digits_shards[1:]}))
    assert (manifest.num_shards, manifest.num_ok) == (1, 15)
    cache = open_cache(tiny_cache.url)
    assert [shard.shard_id for shard in cache.shards] == ["digits-01"]
    means = cache.class_means()
    assert means is not None
    assert means.count_K.sum() == 15
    after = files(tiny_cache.url)
    parts = [path for path in before if path.startswith(("parts/", "commits/", "means/"))]
    assert all(after[path] == before[path] for path in parts)


def test_class_means_without_any_label_are_refused_and_nothing_is_published(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    samples = [(key, {"png": members["png"]}) for key, members in digit_samples(5)]
    shards = pack_shards(samples, f"{tmp_path}/bare-%02d.tar", shard_size=5)
    config = tiny_config(data={"shards": shards, "missing_labels": "ignore"})
    with pytest.raises(CacheError, match=r"cache\.no-labels"):
        build(config)
    assert not [path for path in files(url_of(config)) if path.startswith("manifest")]


def test_an_unfinished_build_has_no_manifest_and_shows_its_blocks_without_totals(tiny_config: TinyConfig) -> None:
    config = tiny_config()
    prepare(config)
    urls = shard_urls(config)
    build_part(PartTask(config, urls["digits-00"], ViewBlock(start=0, stop=2)))
    with raises("cache.no-complete-view", CacheError):
        publish_manifest(url_of(config), urls)
    build_part(PartTask(config, urls["digits-01"], ViewBlock(start=0, stop=1)))
    build_part(PartTask(config, urls["digits-01"], ViewBlock(start=2, stop=3)))
    report = inspect_cache(url_of(config))
    assert report.parts_by_block == {"v0000-0000": 1, "v0000-0001": 1, "v0002-0002": 1}
    assert report.rows_by_block == {"v0000-0000": 15, "v0000-0001": 40, "v0002-0002": 15}
    assert (report.shards_begun, report.num_shards, report.num_ok, report.skipped) == (2, None, None, None)
    # View 1 is missing in one shard.
    assert publish_manifest(url_of(config), urls).num_views == 1


def test_a_manifest_has_the_shard_urls_of_the_build(built_cache: TinyCache, digits_shards: list[str]) -> None:
    cache = open_cache(built_cache.url)
    assert [cache.shard_url(shard) for shard in cache.shards] == digits_shards
    assert [shard.path for shard in cache.shards] == ["digits-00.tar", "digits-01.tar"]


@pytest.mark.parametrize(
    ("urls", "base"),
    [
        (["/data/a.tar"], "/data"),
        (["/a.tar"], ""),
        (["/data/x/a.tar", "/data/y/b.tar"], "/data"),
        (["/data/x/a.tar", "/other/b.tar"], ""),
        (["/data/train/a.tar", "/data/train2/b.tar"], "/data"),
        (["/data/a.tar", "/data/x/y/b.tar"], "/data"),
        (["s3://bucket/a.tar"], "s3://bucket"),
        (["s3://bucket/x/a.tar", "s3://bucket/y/b.tar"], "s3://bucket"),
        (["s3://one/x/a.tar", "s3://two/x/b.tar"], ""),
        (["s3://one/x/a.tar", "gs://one/x/b.tar"], ""),
        (["/data/a.tar", "s3://one/b.tar"], ""),
        (["s3://one/b.tar", "/data/a.tar"], ""),
    ],
)
def test_base_and_path_find_every_shard_again(urls: list[str], base: str) -> None:
    common, paths = relative({url: url for url in urls})
    assert common == base
    assert [locate(common, paths[url]) for url in urls] == urls


def test_queries_and_credentials_are_never_stored() -> None:
    base, names = relative({"a": "https://me:secret@host/x/a.tar?token=secret", "b": "https://host/x/b.tar#secret"})
    assert (base, names) == ("https://host/x", {"a": "a.tar", "b": "b.tar"})


folders = st.lists(st.sampled_from(["x", "y", "zz"]), max_size=3).map("/".join)


@given(st.lists(st.tuples(st.sampled_from(["", "s3://b", "s3://c", "gs://b"]), folders), min_size=1, max_size=5))
def test_relative_and_locate_are_inverse_for_any_set_of_shards(locations: list[tuple[str, str]]) -> None:
    urls = [f"{root}/{f'{folder}/' if folder else ''}{number}.tar" for number, (root, folder) in enumerate(locations)]
    base, names = relative({url: url for url in urls})
    assert [locate(base, names[url]) for url in urls] == urls


def test_a_commit_under_another_header_is_refused(tiny_cache: TinyCache) -> None:
    path = layout.commit_path("digits-00", ViewBlock(start=2, stop=3))
    foreign = read_commit(tiny_cache.url, path).model_copy(update={"fingerprint": "another"})
    storage.write(storage.join(tiny_cache.url, path), seal(foreign.model_dump(mode="json")))
    with pytest.raises(CacheError, match=r"cache\.commit-of-another-header[\s\S]*digits-00/v0002-0002"):
        publish_manifest(tiny_cache.url, shard_urls(tiny_cache.config))


def test_the_manifest_adds_up_the_commits(built_cache: TinyCache) -> None:
    manifest, data = read_manifest(built_cache.url)
    commits = read_commits(built_cache.url)
    assert manifest.size_bytes == sum(commit.part.size_bytes for commit in commits)
    assert manifest.statistics.argmax_flips == sum(commit.statistics.argmax_flips for commit in commits)
    assert (manifest.num_samples, manifest.num_ok, manifest.num_views, manifest.num_shards) == (35, 35, 3, 2)
    assert json.loads(data)["format_version"] == 1
