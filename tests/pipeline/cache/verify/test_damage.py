"""Whatever happens to a file of a cache, verify names the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.cache.verify import VerifyReport, verify_cache
from pipeline.core.errors import CacheError
from tests.pipeline.caches import TinyCache, files

KINDS = [
    "header.json",
    "manifest.json",
    "manifest/shards.parquet",
    "manifest/parts.parquet",
    "manifest/former/*",
    "class_means.parquet",
    "index/digits-01.parquet",
    "commits/digits-00/v0002-0002.json",
    "commits/digits-01/eval.json",
    "parts/digits-00/eval.*",
    "parts/digits-01/v0003-0004.*",
    "means/digits-01/eval.*",
]


def one(cache: TinyCache, pattern: str) -> Path:
    return sorted(Path(cache.url).glob(pattern))[0]


def named(report: VerifyReport) -> set[str]:
    return {problem.file for problem in report.problems}


def test_a_whole_cache_has_no_problem_and_everything_was_checked(grown_cache: TinyCache) -> None:
    report = verify_cache(grown_cache.url, threads=2)
    assert report.problems == ()
    assert report.ok
    assert report.not_checked == {}
    assert (report.num_unnamed, report.unnamed) == (0, ())
    present = files(grown_cache.url)
    counts = {
        "records": 4 + 8,
        "former tables": sum(path.startswith("manifest/former/") for path in present),
        "indexes": 2,
        "samples": 35,
        "parts": 8,
        "class sums": 2,
        "class means": 1,
        "views": 2 * (5 + 1),
        "rows": 34 * (5 + 1),
        "bytes": sum(len(data) for path, data in present.items() if path.startswith("parts/")),
    }
    assert counts.items() <= report.checked.items()
    assert report.checked["canaries"] >= 2 * (5 + 1)


@pytest.mark.slow
@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_a_flipped_bit_is_found_in_whatever_file_it_is(cache: TinyCache, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(files(cache.url))))
    path = Path(cache.url, name)
    intact = path.read_bytes()
    damaged = bytearray(intact)
    damaged[data.draw(st.integers(0, len(intact) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(damaged)
    try:
        assert name in named(verify_cache(cache.url))
    finally:
        path.write_bytes(intact)


@pytest.mark.parametrize("pattern", KINDS)
def test_a_file_that_is_cut_emptied_or_longer_is_one_problem(cache: TinyCache, pattern: str) -> None:
    path = one(cache, pattern)
    intact = path.read_bytes()
    for data in (intact[:-1], intact[: len(intact) // 2], b"", intact + b"\n"):
        path.write_bytes(data)
        report = verify_cache(cache.url)
        assert str(path.relative_to(cache.url)) in named(report)
        assert report.num_problems == 1


@pytest.mark.parametrize("pattern", [kind for kind in KINDS if "former" not in kind])
def test_a_file_that_is_gone_is_one_problem(cache: TinyCache, pattern: str) -> None:
    path = one(cache, pattern)
    path.unlink()
    report = verify_cache(cache.url)
    assert named(report) == {str(path.relative_to(cache.url))}
    assert report.num_problems == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("commits/digits-00/eval.json", "commits/digits-01/eval.json"),
        ("commits/digits-00/v0000-0001.json", "commits/digits-00/v0002-0002.json"),
        ("index/digits-00.parquet", "index/digits-01.parquet"),
        ("parts/digits-00/eval.*", "parts/digits-01/eval.*"),
        ("means/digits-00/eval.*", "means/digits-01/eval.*"),
        ("manifest/shards.parquet", "manifest/parts.parquet"),
    ],
)
def test_two_files_that_changed_places_are_both_named(cache: TinyCache, first: str, second: str) -> None:
    one_path, other_path = one(cache, first), one(cache, second)
    one_data, other_data = one_path.read_bytes(), other_path.read_bytes()
    one_path.write_bytes(other_data)
    other_path.write_bytes(one_data)
    assert named(verify_cache(cache.url)) >= {str(path.relative_to(cache.url)) for path in (one_path, other_path)}


def test_the_rest_of_a_damaged_cache_is_still_checked(cache: TinyCache) -> None:
    whole = verify_cache(cache.url)
    one(cache, "parts/digits-00/eval.*").write_bytes(b"damaged")
    Path(cache.url, "commits/digits-01/v0000-0001.json").write_bytes(b"damaged")
    report = verify_cache(cache.url)
    assert report.num_problems == 2
    assert report.checked["rows"] == whole.checked["rows"] - 19 - 2 * 15
    assert report.not_checked["totals of the manifest: a commit is damaged or missing"] == 1


def test_files_that_nothing_names_are_told_and_are_no_problem(cache: TinyCache) -> None:
    strays = ["notes.txt", "parts/digits-00/eval.0123456789abcdef.parquet", "index/digits-07.parquet", "means/.tmp-1"]
    for stray in strays:
        Path(cache.url, stray).write_bytes(b"")
    Path(cache.url, "log").mkdir()
    Path(cache.url, "log/build.json").write_bytes(b"{}")
    report = verify_cache(cache.url)
    assert report.ok
    assert sorted(report.unnamed) == sorted(strays)


def test_what_stands_in_a_folder_without_a_cache_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(CacheError, match="there is no cache here"):
        verify_cache(str(tmp_path))


def test_the_number_of_problems_is_exact_where_only_the_first_are_kept(
    cache: TinyCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.cache.verify.report._KEPT_PROBLEMS", 3)
    for path in Path(cache.url, "parts").rglob("*.parquet"):
        path.write_bytes(b"damaged")
    report = verify_cache(cache.url)
    assert (len(report.problems), report.num_problems) == (3, 8)


def test_a_report_is_plain_json(cache: TinyCache) -> None:
    one(cache, "parts/digits-00/eval.*").unlink()
    found = json.loads(json.dumps(verify_cache(cache.url).as_dict()))
    assert found["ok"] is False
    assert found["problems"][0]["shard"] == "digits-00"
