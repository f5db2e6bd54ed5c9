"""Merged caches have the bytes of a cache that was built at once, over shards or over views."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from pipeline.cache.build.manifest import read_manifest
from pipeline.cache.derive.convert import convert
from pipeline.cache.derive.merge import merge
from pipeline.cache.format import layout
from pipeline.cache.verify import VerifyReport, compare_with_sources, verify_cache
from pipeline.core.hashing import digest
from pipeline.shards.writer import pack_shards
from tests.errors import raises
from tests.pipeline.caches import TinyCache, build, cache_section, copy_of, digit_samples, files
from tests.pipeline.conftest import TinyConfig

RECORDS = {layout.HEADER, layout.MANIFEST}
Part = Callable[..., str]


@pytest.fixture
def part(built_cache: TinyCache, tmp_path: Path) -> Part:
    """``part("name", shard_ids=…, num_views=…)``: a part of ``built_cache`` as a cache of its own."""

    def get(name: str, **options: Any) -> str:
        convert(built_cache.url, str(tmp_path / name), encodings={}, **options)
        return str(tmp_path / name)

    return get


@pytest.fixture
def rest(built_cache: TinyCache, tmp_path: Path) -> str:
    """``built_cache`` without its eval pass and first two views, as an unfinished build leaves it."""
    copied = copy_of(built_cache, tmp_path / "rest")
    Path(copied.url, layout.MANIFEST).unlink()
    for name in ("eval", "v0000-0001"):
        for path in Path(copied.url, "commits").glob(f"*/{name}.json"):
            path.unlink()
    return copied.url


def compared(url: str, *sources: str) -> VerifyReport:
    report = verify_cache(url)
    compare_with_sources(url, sources, report)
    return report


def differing(url: str, expected_url: str) -> set[str]:
    got, expected = files(url), files(expected_url)
    return {path for path in got.keys() | expected.keys() if got.get(path) != expected.get(path)}


def test_over_shards_all_blocks_tables_and_means_are_those_of_one_build(
    built_cache: TinyCache, part: Part, tmp_path: Path
) -> None:
    sources = [part("first", shard_ids=["digits-00"]), part("second", shard_ids=["digits-01"])]
    out = str(tmp_path / "out")
    manifest = merge(sources, out)
    assert differing(out, built_cache.url) == RECORDS
    assert (manifest.num_shards, manifest.num_views, manifest.fingerprint) == (
        2,
        3,
        read_manifest(built_cache.url)[0].fingerprint,
    )
    header = json.loads(storage.read(f"{out}/{layout.HEADER}"))
    sums = [digest(storage.read(f"{url}/{layout.MANIFEST}")) for url in sources]
    assert header["derived"] == {"kind": "merge", "sources": sums, "encodings": {}}
    report = compared(out, *reversed(sources))
    assert report.ok, report.problems
    assert merge(sources, out) == manifest


def test_over_views_an_unfinished_cache_adds_its_commits(
    built_cache: TinyCache, part: Part, rest: str, tmp_path: Path
) -> None:
    sources = [part("first", num_views=2), rest]
    assert merge(sources, str(tmp_path / "out")).num_views == 3
    assert differing(str(tmp_path / "out"), built_cache.url) == RECORDS
    assert compared(str(tmp_path / "out"), *sources).ok


def test_shards_with_more_views_than_others_stay_and_the_smallest_number_counts(part: Part, tmp_path: Path) -> None:
    sources = [part("first", shard_ids=["digits-00"]), part("second", shard_ids=["digits-01"], num_views=2)]
    assert merge(sources, str(tmp_path / "out")).num_views == 2
    assert verify_cache(str(tmp_path / "out")).ok


def test_overlapping_blocks_are_refused(built_cache: TinyCache, part: Part, tmp_path: Path) -> None:
    other = part("other", shard_ids=["digits-01"], num_views=2)
    with raises("cache.merge-overlap", got="block eval of digits-01"):
        merge([built_cache.url, other], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sections", "changed"),
    [
        ({"cache": {"logits": "fp16"}}, "teacher.logits: fp32 -> fp16"),
        ({"views": {"seed": 4}}, "views.seed: 0 -> 4"),
        ({"data": {"max_pixels": 10**6}}, "data.max_pixels: 64000000 -> 1000000"),
    ],
)
def test_caches_of_different_teachers_or_plans_are_refused_with_what_differs(
    part: Part, tiny_config: TinyConfig, tmp_path: Path, sections: dict[str, dict[str, Any]], changed: str
) -> None:
    other = tiny_config(**{**sections, "views": {"count": 1, **sections.get("views", {})}})
    build(other)
    with raises("cache.merge-differs") as caught:
        merge([part("first", shard_ids=["digits-00"]), cache_section(other).url], str(tmp_path / "out"))
    assert changed in str(caught.value.got)


def test_other_samples_in_a_shard_of_the_same_name_are_refused(
    part: Part, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    shards = pack_shards([*digit_samples(40)][20:], f"{tmp_path}/digits-%02d.tar", shard_size=20)
    other = tiny_config(data={"shards": shards}, views={"count": 1})
    build(other)
    with raises("cache.merge-index-differs"):
        merge([part("first", shard_ids=["digits-00"]), cache_section(other).url], str(tmp_path / "out"))


def test_a_shard_of_unfinished_caches_alone_and_a_single_source_are_refused(
    built_cache: TinyCache, part: Part, rest: str, tmp_path: Path
) -> None:
    with raises("cache.merge-unfinished"):
        merge([part("first", shard_ids=["digits-00"], num_views=2), rest], str(tmp_path / "out"))
    with raises("config.too-few-sources"):
        merge([built_cache.url, built_cache.url], str(tmp_path / "out"))


def test_an_interrupted_merge_is_no_cache_and_continues(
    built_cache: TinyCache, part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, out = [part("a", shard_ids=["digits-00"]), part("b", shard_ids=["digits-01"])], str(tmp_path / "out")
    create = storage.create

    def dying(url: str, data: bytes) -> bool:
        if "digits-01/v0000" in url:
            raise KeyboardInterrupt
        return create(url, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "create", dying)
        with pytest.raises(KeyboardInterrupt):
            merge(sources, out)
    assert not Path(out, layout.MANIFEST).exists()
    merge(sources, out)
    assert differing(out, built_cache.url) == RECORDS
