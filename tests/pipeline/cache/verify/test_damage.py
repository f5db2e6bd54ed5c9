"""``verify_cache`` names each file that is damaged, missing or swapped."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.cache.verify import VerifyReport, verify_cache
from pipeline.core.errors import CacheError
from tests.errors import raises
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
    "moments/*.json",
    "moments/*.parquet",
]

DAMAGES: dict[str, Callable[[Path], object]] = {
    "shorter": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
}


def first_match(cache: TinyCache, pattern: str) -> Path:
    return sorted(Path(cache.url).glob(pattern))[0]


def problem_files(report: VerifyReport) -> set[str]:
    return {problem.file for problem in report.problems}


def test_an_intact_cache_has_no_problem_and_everything_is_checked(grown_cache: TinyCache) -> None:
    report = verify_cache(grown_cache.url, threads=2)
    assert report.problems == []
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
        "moments": 2,
        "views": 2 * (5 + 1),
        "rows": 34 * (5 + 1),
        "bytes": sum(len(data) for path, data in present.items() if path.startswith("parts/")),
    }
    assert counts.items() <= report.checked.items()
    assert report.checked["canaries"] >= 2 * (5 + 1)


@pytest.mark.slow
@settings(max_examples=90, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_to_any_file_is_a_problem_of_that_file(cache: TinyCache, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(files(cache.url))))
    path = Path(cache.url, name)
    intact = path.read_bytes()
    damage = data.draw(st.sampled_from([*DAMAGES.values(), None]))
    if damage is None:
        damaged = bytearray(intact)
        damaged[data.draw(st.integers(0, len(intact) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(damaged)
    else:
        damage(path)
    try:
        assert name in problem_files(verify_cache(cache.url))
    finally:
        path.write_bytes(intact)


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        *zip(KINDS, cycle(DAMAGES), strict=False),
        # A former table that is missing is no problem: ``gc --former`` removes them. Without a record there are no
        # moments, and its table has no name.
        *((kind, "missing") for kind in KINDS if "former" not in kind and kind != "moments/*.json"),
    ],
)
def test_a_damaged_or_missing_file_is_one_problem(cache: TinyCache, pattern: str, damage: str) -> None:
    path = first_match(cache, pattern)
    if damage == "missing":
        path.unlink()
    else:
        DAMAGES[damage](path)
    report = verify_cache(cache.url)
    assert problem_files(report) == {str(path.relative_to(cache.url))}
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
def test_two_swapped_files_are_both_problems(cache: TinyCache, first: str, second: str) -> None:
    paths = [first_match(cache, pattern) for pattern in (first, second)]
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content)
    assert problem_files(verify_cache(cache.url)) >= {str(path.relative_to(cache.url)) for path in paths}


def test_the_rest_of_a_damaged_cache_is_still_checked(cache: TinyCache) -> None:
    intact = verify_cache(cache.url)
    first_match(cache, "parts/digits-00/eval.*").write_bytes(b"damaged")
    Path(cache.url, "commits/digits-01/v0000-0001.json").write_bytes(b"damaged")
    report = verify_cache(cache.url)
    assert report.num_problems == 2
    assert report.checked["rows"] == intact.checked["rows"] - 19 - 2 * 15
    assert report.not_checked["totals of the manifest: a commit is damaged or missing"] == 1


def test_files_that_no_record_names_are_listed_and_are_no_problem(cache: TinyCache) -> None:
    strays = ["notes.txt", "parts/digits-00/eval.0123456789abcdef.parquet", "index/digits-07.parquet", "means/.tmp-1"]
    for stray in strays:
        Path(cache.url, stray).write_bytes(b"")
    Path(cache.url, "log").mkdir()
    Path(cache.url, "log/build.json").write_bytes(b"{}")
    report = verify_cache(cache.url)
    assert report.ok
    assert sorted(report.unnamed) == sorted(strays)


def test_a_folder_without_a_cache_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("none")
    with raises("cache.missing", CacheError):
        verify_cache(str(tmp_path))


def test_the_number_of_problems_is_exact_even_if_only_the_first_are_stored(
    cache: TinyCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.cache.verify.report.MAX_PROBLEMS", 3)
    for path in Path(cache.url, "parts").rglob("*.parquet"):
        path.write_bytes(b"damaged")
    report = verify_cache(cache.url)
    assert (len(report.problems), report.num_problems) == (3, 8)


def test_a_report_is_plain_json(cache: TinyCache) -> None:
    first_match(cache, "parts/digits-00/eval.*").unlink()
    report = json.loads(json.dumps(verify_cache(cache.url).as_dict()))
    assert report["ok"] is False
    assert (report["problems"][0]["shard"], report["problems"][0]["code"]) == ("digits-00", "cache.missing-file")
