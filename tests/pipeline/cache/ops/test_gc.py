"""Garbage collection removes old files that no record names, and never a named file."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pipeline.cache.build.context import prepare
from pipeline.cache.build.manifest import read_manifest
from pipeline.cache.build.part import PartTask, build_part
from pipeline.cache.ops.gc import GcReport, collect_garbage
from pipeline.cache.read.reader import open_cache
from pipeline.cache.verify import verify_cache
from pipeline.core.errors import CacheError
from schemas.cache_format import ViewBlock
from tests.errors import raises
from tests.pipeline.caches import TinyCache, build, cache_section, files, read_commits, shard_urls
from tests.pipeline.conftest import TinyConfig

HOUR_S = 3600.0
UNNAMED = (
    "parts/digits-00/eval.0123456789abcdef.parquet",
    "parts/digits-09/v0000-0001.0123456789abcdef.parquet",
    "means/digits-00/eval.0123456789abcdef.parquet",
    "index/digits-09.parquet",
    "commits/digits-00/.tmp-1f",
    ".tmp-2e",
)


def write_files(cache: TinyCache, *paths: str) -> None:
    for path in paths:
        target = Path(cache.url, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"12345")


def collect(url: str, *, age_s: float = 2 * HOUR_S, former: bool = False, dry_run: bool = False) -> GcReport:
    """Collects garbage ``age_s`` in the future, with a minimum age of one hour."""
    return collect_garbage(url, min_age_s=HOUR_S, former=former, dry_run=dry_run, now_s=time.time() + age_s)


def test_unnamed_files_are_removed_and_no_others(tiny_cache: TinyCache) -> None:
    before = files(tiny_cache.url)
    write_files(tiny_cache, *UNNAMED)
    report = collect(tiny_cache.url)
    assert sorted(report.removed) == sorted(UNNAMED)
    assert (report.freed_bytes, report.num_recent, report.num_former_files) == (5 * len(UNNAMED), 0, 0)
    assert files(tiny_cache.url) == before
    assert not list(Path(tiny_cache.url).rglob(".tmp-*"))
    assert verify_cache(tiny_cache.url).ok


def test_a_dry_run_reports_the_same_and_removes_nothing(tiny_cache: TinyCache) -> None:
    write_files(tiny_cache, *UNNAMED)
    planned = collect(tiny_cache.url, dry_run=True)
    assert all(Path(tiny_cache.url, path).exists() for path in UNNAMED)
    done = collect(tiny_cache.url)
    assert (planned.removed, planned.freed_bytes) == (done.removed, done.freed_bytes)


def test_recent_files_stay_because_a_running_builder_commits_its_part_last(tiny_cache: TinyCache) -> None:
    write_files(tiny_cache, *UNNAMED)
    report = collect(tiny_cache.url, age_s=0)
    assert (report.removed, report.num_recent) == ((), len(UNNAMED))
    assert all(Path(tiny_cache.url, path).exists() for path in UNNAMED)


def test_an_index_stays_while_any_file_of_the_cache_is_recent(tiny_cache: TinyCache) -> None:
    write_files(tiny_cache, *UNNAMED)
    for path in Path(tiny_cache.url).rglob("*"):
        os.utime(path, (0, 0))
    Path(tiny_cache.url, "commits/digits-00/eval.json").touch()
    report = collect(tiny_cache.url, age_s=0)
    assert sorted(report.removed) == sorted(set(UNNAMED) - {"index/digits-09.parquet"})


def test_files_that_no_build_writes_stay(tiny_cache: TinyCache) -> None:
    foreign = ("notes.txt", "parts/digits-00/notes.txt", "commits/readme.md", "log/build.json", "class_means.json")
    write_files(tiny_cache, *foreign)
    assert collect(tiny_cache.url).removed == ()
    assert all(Path(tiny_cache.url, path).exists() for path in foreign)


def test_former_tables_are_removed_only_with_former(tiny_cache: TinyCache, tiny_config: TinyConfig) -> None:
    pinned = open_cache(tiny_cache.url).manifest_bytes
    build(tiny_config(views={"count": 5}))
    report = collect(tiny_cache.url)
    assert report.removed == ()
    assert report.num_former_files == 1
    assert open_cache(tiny_cache.url, manifest_bytes=pinned).view("digits-00", 0).row_N.size == 20
    assert collect(tiny_cache.url, former=True).freed_bytes == report.former_bytes
    with raises("cache.changed-file", CacheError):
        open_cache(tiny_cache.url, manifest_bytes=pinned).view("digits-00", 0)


def test_a_part_that_the_manifest_names_stays_without_a_commit(tiny_cache: TinyCache) -> None:
    commit = read_commits(tiny_cache.url)[0]
    Path(tiny_cache.url, "commits", commit.shard_id, f"{commit.block.name}.json").unlink()
    assert commit.means is not None
    assert collect(tiny_cache.url).removed == (commit.means.path,)
    assert Path(tiny_cache.url, commit.part.path).exists()


def test_garbage_of_an_unfinished_cache_is_removed(tiny_config: TinyConfig) -> None:
    config = tiny_config()
    prepare(config)
    build_part(PartTask(config, shard_urls(config)["digits-00"], ViewBlock(start=0, stop=2)))
    cache = TinyCache(cache_section(config).url, config)
    before = files(cache.url)
    write_files(cache, *UNNAMED)
    assert sorted(collect(cache.url).removed) == sorted(UNNAMED)
    assert files(cache.url) == before
    assert build(config) == read_manifest(cache.url)[0]


@pytest.mark.parametrize("record", ["commits/digits-00/eval.json", "manifest.json", "manifest/parts.parquet"])
def test_nothing_is_removed_while_a_record_is_damaged(tiny_cache: TinyCache, record: str) -> None:
    write_files(tiny_cache, *UNNAMED)
    Path(tiny_cache.url, record).write_bytes(b"damaged")
    with pytest.raises(CacheError):
        collect(tiny_cache.url)
    assert all(Path(tiny_cache.url, path).exists() for path in UNNAMED)


def test_a_folder_without_a_cache_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / ".tmp-1").write_bytes(b"other data")
    with raises("cache.missing", CacheError):
        collect(str(tmp_path))
    assert (tmp_path / ".tmp-1").exists()
