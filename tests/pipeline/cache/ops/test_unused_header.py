"""A header without commits can be removed so that another build can begin; no cache mixes two headers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from pipeline.cache.build.build_log import STALE_S, BuildLogWriter
from pipeline.cache.build.context import prepare
from pipeline.cache.build.part import PartTask, build_part
from pipeline.cache.format import layout
from pipeline.cache.format.header import find_header, read_header
from pipeline.cache.ops.gc import remove_unused_header
from pipeline.cache.verify import verify_cache
from pipeline.core.errors import CacheError
from schemas.config import Config
from tests.errors import raises
from tests.pipeline.cache import teachers
from tests.pipeline.caches import TinyCache, build, cache_section, open_tasks, read_commits, shard_urls
from tests.pipeline.conftest import TinyConfig


def url_of(config: Config) -> str:
    return cache_section(config).url


def write_log(config: Config, *, renewed_s: float) -> BuildLogWriter:
    log = BuildLogWriter(url_of(config), num_parts=6, num_before=0, clock=lambda: renewed_s)
    log.update(0)
    return log


@pytest.fixture
def disturbed(tiny_config: TinyConfig, digits_shards: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Configs, and a function that registers a call for their teacher's next forward."""

    def config(**overrides: Any) -> Config:
        teacher = {"model": "python:tests.pipeline.cache.teachers:Disturbed", "kwargs": {}, "mean": [0.5] * 3}
        few = {"data": {"shards": digits_shards[1:]}, "cache": {"class_means": "none"}}
        return tiny_config(teacher=teacher, **few, **overrides)

    def during_the_next_part(act: Any) -> None:
        def once() -> None:
            monkeypatch.setattr(teachers, "during_forward", teachers.do_nothing)
            act()

        monkeypatch.setattr(teachers, "during_forward", once)

    return config, during_the_next_part


def test_the_error_about_an_unused_header_has_the_command_that_removes_it(tiny_config: TinyConfig) -> None:
    config = tiny_config()
    prepare(config)
    with raises("cache.unused-header", CacheError) as caught:
        prepare(tiny_config(views={"seed": 1}))
    assert f"stillroom cache gc {url_of(config)} --unused-header" in str(caught.value.next_step)
    assert find_header(url_of(config)) is not None
    build_part(open_tasks(config)[0])
    with raises("cache.other-header", CacheError):
        prepare(tiny_config(views={"seed": 1}))


def test_after_the_removal_another_config_builds_the_same_cache_as_without_the_first_build(
    tiny_config: TinyConfig, built_cache: TinyCache
) -> None:
    # The index settings of a part that was never committed name another label member.
    wrong, right = tiny_config(data={"label": "nothing"}, cache={"class_means": "none"}), tiny_config()
    task = PartTask(wrong, shard_urls(wrong)["digits-00"], open_tasks(wrong)[0].block)
    prepare(wrong)
    commit = build_part(task)
    storage.delete(storage.join(url_of(wrong), layout.commit_path(commit.shard_id, commit.block)))
    report = remove_unused_header(url_of(right))
    assert report.removed == ("index/digits-00.parquet", "header.json")
    assert build(right).fingerprint == read_header(built_cache.url).fingerprint
    assert verify_cache(url_of(right)).ok


def test_a_dry_run_removes_nothing(tiny_config: TinyConfig) -> None:
    prepare(tiny_config())
    assert remove_unused_header(url_of(tiny_config()), dry_run=True).removed == ("header.json",)
    assert find_header(url_of(tiny_config())) is not None


def test_a_header_with_a_commit_or_a_manifest_stays(tiny_cache: TinyCache) -> None:
    for path in Path(tiny_cache.url, "commits").rglob("*.json"):
        path.unlink()
    with raises("cache.header-in-use", CacheError):
        remove_unused_header(tiny_cache.url, force=True)
    build(tiny_cache.config)
    Path(tiny_cache.url, layout.MANIFEST).unlink()
    with raises("cache.header-in-use", CacheError):
        remove_unused_header(tiny_cache.url, force=True)
    assert find_header(tiny_cache.url) is not None


def test_a_missing_cache_is_an_error(tmp_path: Path) -> None:
    with raises("cache.missing", CacheError):
        remove_unused_header(str(tmp_path))


def test_the_header_of_a_running_build_stays_until_its_log_is_old_or_force_is_given(tiny_config: TinyConfig) -> None:
    config, now_s = tiny_config(), time.time()
    prepare(config)
    write_log(config, renewed_s=now_s)
    with raises("cache.build-running", CacheError) as caught:
        remove_unused_header(url_of(config), now_s=now_s + STALE_S - 1)
    assert f"gc {url_of(config)} --unused-header --force" in str(caught.value.next_step)
    assert find_header(url_of(config)) is not None
    assert "header.json" in remove_unused_header(url_of(config), force=True, dry_run=True).removed
    remove_unused_header(url_of(config), now_s=now_s + STALE_S + 1)
    assert storage.listing(url_of(config)) == []


def test_a_builder_claims_the_cache_again_if_its_header_is_removed_during_a_part(disturbed: Any) -> None:
    configure, during_the_next_part = disturbed
    config = configure()
    prepare(config)
    during_the_next_part(lambda: remove_unused_header(url_of(config)))
    first = open_tasks(config)[0]
    commit = build_part(first)
    assert read_header(url_of(config)).fingerprint == commit.fingerprint
    build(config)
    assert verify_cache(url_of(config)).ok


def test_a_builder_revokes_its_commit_and_stops_if_another_builder_claimed_the_cache(disturbed: Any) -> None:
    configure, during_the_next_part = disturbed
    config, other = configure(), configure(views={"seed": 1})
    prepare(config)

    def claim_for_another() -> None:
        remove_unused_header(url_of(config))
        prepare(other)

    during_the_next_part(claim_for_another)
    with raises("cache.other-header", CacheError):
        build_part(open_tasks(config)[0])
    assert read_commits(url_of(config)) == []
    with raises("cache.unused-header", CacheError):
        build_part(open_tasks(config)[0])
    manifest = build(other)
    assert {commit.fingerprint for commit in read_commits(url_of(other))} == {manifest.fingerprint}
    assert verify_cache(url_of(other)).ok


def test_a_commit_during_the_removal_restores_the_header(
    tiny_config: TinyConfig, digits_shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(data={"shards": digits_shards[1:]}, views={"count": 1})
    prepare(config)
    before, task, delete = read_header(url_of(config)), open_tasks(config)[0], storage.delete

    def commit_first(url: str) -> None:
        if url.endswith(layout.HEADER):
            build_part(task)
        delete(url)

    monkeypatch.setattr(storage, "delete", commit_first)
    with raises("cache.header-in-use", CacheError):
        remove_unused_header(url_of(config))
    assert read_header(url_of(config)) == before
    monkeypatch.undo()
    build(config)
    assert verify_cache(url_of(config)).ok


def test_a_commit_under_another_header_is_refused(tiny_config: TinyConfig) -> None:
    config, other = tiny_config(), tiny_config(views={"seed": 1})
    prepare(config)
    task = open_tasks(config)[0]
    build_part(task)
    storage.delete(storage.join(url_of(config), layout.HEADER))
    prepare(other)
    with raises("cache.commit-of-another-header", CacheError):
        build_part(PartTask(other, task.shard_url, task.block))
