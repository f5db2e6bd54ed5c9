"""A converted cache: the bytes of a direct build where nothing was lost before, the decoded source where something was;
transactional, and compared with its source."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from pipeline import storage
from pipeline.cache.build.manifest import read_manifest
from pipeline.cache.build.part import build_part
from pipeline.cache.derive.convert import convert
from pipeline.cache.format import layout
from pipeline.cache.ops.copy import copy_cache
from pipeline.cache.ops.inspect import inspect_cache
from pipeline.cache.ops.relabel import relabel
from pipeline.cache.read.reader import open_cache
from pipeline.cache.verify import VerifyReport, compare_with_sources, verify_cache
from pipeline.core.hashing import digest
from tests.errors import raises
from tests.marks import slow
from tests.pipeline.caches import TinyCache, build, cache_section, copy_of, files, open_tasks, read_commits
from tests.pipeline.conftest import TinyConfig, build_tiny, tiny_config_of
from tests.pipeline.student.runs import rewrite_view, set_cell

RECORDS = {layout.HEADER, layout.MANIFEST}


class KilledError(Exception):
    """Ends a conversion like the death of its process."""


@pytest.fixture(scope="module")
def int8_cache(digits_shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> TinyCache:
    """The teacher and views of ``built_cache``, with int8 logits and embeddings. Never written to."""
    url = str(tmp_path_factory.mktemp("int8") / "cache")
    return build_tiny(digits_shards, url, {"cache": {"logits": "int8", "embeddings": "int8"}})


def converted(source: str, folder: Path, **options: Any) -> str:
    url = str(folder / "converted")
    options.setdefault("encodings", {})
    convert(source, url, **options)
    return url


def compared(url: str, *sources: str) -> VerifyReport:
    report = verify_cache(url)
    compare_with_sources(url, sources, report)
    return report


def header_of(url: str) -> dict[str, Any]:
    return json.loads(storage.read(storage.join(url, layout.HEADER)))


def stored_rows(url: str, shard: str, view: int, name: str) -> list[bytes]:
    """The bytes of a column, by the manifest's own tables and pyarrow alone."""
    parts = pq.read_table(Path(url, layout.PARTS), filters=[("shard_id", "==", shard), ("view", "==", view)])
    table = pq.read_table(Path(url, parts["path"][0].as_py()), columns=[name], filters=[("view", "==", view)])
    return table[name].to_pylist()


def int8_float64(rows: list[bytes]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Decoded rows [N,D] and their scales [N,1], as docs/reference/format.md has them."""
    heads = np.array([np.frombuffer(row[:8], "<f4") for row in rows], np.float64)
    codes = np.array([np.frombuffer(row[8:], np.uint8) for row in rows], np.float64)
    return heads[:, :1] + heads[:, 1:] * codes, heads[:, 1:]


@pytest.mark.parametrize(
    "encodings",
    [
        {"logits": "int8"},
        {"logits": "topk:4", "embeddings": "none"},
        {"logits": "sampled:3@2", "embeddings": "int8"},
        slow({"logits": "fp16", "embeddings": "int8"}),
        slow({"logits": "none"}),
    ],
    ids=str,
)
def test_of_fp32_outputs_every_file_has_the_bytes_of_the_teachers_build(
    built_cache: TinyCache, tiny_config: TinyConfig, tmp_path: Path, encodings: dict[str, str]
) -> None:
    direct = tiny_config(cache=encodings)
    build(direct)
    expected = files(cache_section(direct).url)
    got = files(converted(built_cache.url, tmp_path, encodings=encodings))
    assert got.keys() == expected.keys()
    assert {path for path in got if got[path] != expected[path]} == RECORDS
    header, built = (json.loads(tree[layout.HEADER]) for tree in (got, expected))
    old, new = (json.loads(storage.read(f"{url}/{layout.HEADER}")) for url in (built_cache.url, tmp_path / "converted"))
    assert header.pop("derived") == {
        "kind": "convert",
        "sources": [digest(storage.read(storage.join(built_cache.url, layout.MANIFEST)))],
        "encodings": {key: ["fp32", kind] for key, kind in encodings.items()},
    }
    assert {**header, "digest": None} == {**built, "digest": None}
    assert old["fingerprint"] != new["fingerprint"]


@pytest.mark.parametrize("kind", ["int8", slow("none")])
def test_patch_tokens_are_converted_or_dropped(tmp_path: Path, tiny_config: TinyConfig, kind: str) -> None:
    layer, keys = {"tokens_layer": "layer3"}, {"tokens": "fp32", "tokens_grid": 2}
    source = tiny_config(teacher=layer, cache=keys, views={"count": 1})
    build(source)
    new = {"teacher": {}, "cache": {}} if kind == "none" else {"teacher": layer, "cache": {**keys, "tokens": kind}}
    direct = tiny_config(
        teacher=new["teacher"], cache={"url": str(tmp_path / "direct"), **new["cache"]}, views={"count": 1}
    )
    build(direct)
    got = files(converted(cache_section(source).url, tmp_path, encodings={"tokens": kind}))
    expected = files(str(tmp_path / "direct"))
    assert {path for path in got if got[path] != expected.get(path)} == RECORDS


def test_of_lossy_outputs_the_result_is_of_the_decoded_source_and_says_so(
    int8_cache: TinyCache, tmp_path: Path
) -> None:
    url = converted(int8_cache.url, tmp_path, encodings={"logits": "fp32", "embeddings": "fp16"})
    for shard in ("digits-00", "digits-01"):
        for view in (0, 1, 2, 65535):
            source, _ = int8_float64(stored_rows(int8_cache.url, shard, view, "logits"))
            logits = np.array([np.frombuffer(row, "<f4") for row in stored_rows(url, shard, view, "logits")])
            np.testing.assert_allclose(logits, source, rtol=3e-7, atol=1e-7)
            source, _ = int8_float64(stored_rows(int8_cache.url, shard, view, "embedding"))
            half = np.array([np.frombuffer(row, "<f2") for row in stored_rows(url, shard, view, "embedding")])
            np.testing.assert_allclose(half, source, rtol=2.0**-10, atol=2.0**-24)
    header = header_of(url)
    assert header["teacher"]["decoded_from"] == {"logits": ["int8"], "embeddings": ["int8"]}
    assert header["fingerprint"] != header_of(int8_cache.url)["fingerprint"]
    report = compared(url, int8_cache.url)
    assert report.ok, report.problems
    assert report.checked["rows against their sources"] == 35 * 4


def test_a_chain_of_conversions_names_all_its_encodings(built_cache: TinyCache, tmp_path: Path) -> None:
    urls = [built_cache.url]
    for number, kind in enumerate(("int8", "fp32", "fp16", "topk:4")):
        urls.append(converted(urls[-1], tmp_path / str(number), encodings={"logits": kind}))
    chains = [header_of(url)["teacher"].get("decoded_from", {}).get("logits") for url in urls]
    # fp32 loses nothing.
    assert chains == [None, None, ["int8"], ["int8"], ["int8", "fp16"]]
    assert len({header_of(url)["fingerprint"] for url in urls}) == 5
    assert verify_cache(urls[-1]).ok
    with raises("cache.not-convertible"):
        converted(urls[-1], tmp_path / "last", encodings={"logits": "fp16"})
    assert (
        header_of(converted(urls[-1], tmp_path / "none", encodings={"logits": "none"}))["teacher"]["logits"] == "none"
    )


def test_fidelity_is_that_of_the_converted_outputs_to_the_source_as_stored(
    digits_shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a float64 loop over all rows."""
    monkeypatch.setattr("pipeline.cache.build.statistics._SAMPLE_ONE_IN", 1)
    config = tiny_config_of(
        digits_shards, str(tmp_path / "source"), {"cache": {"logits": "fp16", "embeddings": "fp16"}}
    )
    build(config)
    source = str(tmp_path / "source")
    url = converted(source, tmp_path, encodings={"logits": "int8"})
    kl = flips = 0.0
    for shard in ("digits-00", "digits-01"):
        for view in (0, 1, 2, 65535):
            half = [np.frombuffer(row, "<f2").astype(np.float64) for row in stored_rows(source, shard, view, "logits")]
            stored, _ = int8_float64(stored_rows(url, shard, view, "logits"))
            for before, after in zip(half, stored, strict=True):
                p, q = (np.exp(values / 2) / np.exp(values / 2).sum() for values in (before, after))
                kl += float((p * np.log(p / q)).sum())
                flips += before.argmax() != after.argmax()
    statistics, old = read_manifest(url)[0].statistics, read_manifest(source)[0].statistics
    assert statistics.fidelity_rows == old.fidelity_rows == 35 * 4
    assert statistics.kl_sum["2.0"] == pytest.approx(kl, rel=1e-4)
    assert statistics.argmax_flips == flips
    # Those of the embeddings, which stay, and of the teacher are those of the build.
    assert statistics.embedding_cosine_sum == old.embedding_cosine_sum
    assert (statistics.top1_hits, statistics.class_counts) == (old.top1_hits, old.class_counts)


def test_views_and_shards_are_bitwise_those_of_a_build_of_them(
    built_cache: TinyCache, tiny_config: TinyConfig, digits_shards: list[str], tmp_path: Path
) -> None:
    direct = tiny_config(views={"count": 2}, data={"shards": digits_shards[1:]})
    build(direct)
    expected = files(cache_section(direct).url)
    url = converted(built_cache.url, tmp_path, num_views=2, shard_ids=["digits-01"])
    got = files(url)
    # Class means are folded again from the class sums of this shard.
    assert {path for path in got if got[path] != expected.get(path)} == RECORDS
    assert got.keys() == expected.keys()
    assert header_of(url)["fingerprint"] == header_of(built_cache.url)["fingerprint"]
    assert compared(url, built_cache.url).ok
    manifest = read_manifest(url)[0]
    assert (manifest.num_views, manifest.num_shards, manifest.num_ok) == (2, 1, 15)


def test_imported_class_means_are_carried_over(tiny_config: TinyConfig, tmp_path: Path) -> None:
    means = tmp_path / "means.json"
    means.write_text(json.dumps({str(number): [0.5] * 7 for number in range(10)}))
    source = tiny_config(cache={"class_means": str(means)}, views={"count": 1})
    build(source)
    url = converted(cache_section(source).url, tmp_path, encodings={"logits": "int8"})
    assert files(url)[layout.IMPORTED_MEANS] == means.read_bytes()
    assert verify_cache(url).ok
    stored = open_cache(url).class_means()
    assert stored is not None
    assert (stored.mean_KD == 0.5).all()


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({}, "config.nothing-to-convert"),
        ({"encodings": {"logits": "fp32"}}, "config.nothing-to-convert"),
        ({"encodings": {"tokens": "fp16"}}, "cache.output-not-stored"),
        ({"encodings": {"logits": "head"}}, "cache.not-convertible"),
        ({"encodings": {"logits": "topk:10"}}, "config.too-few-classes"),
        ({"num_views": 1}, "cache.views-not-whole"),
        ({"num_views": 4}, "cache.views-not-whole"),
        ({"shard_ids": ["digits-01", "other-07"]}, "cache.missing-shards"),
    ],
    ids=str,
)
def test_what_cannot_be_converted_is_refused_before_anything_is_written(
    built_cache: TinyCache, tmp_path: Path, options: dict[str, Any], code: str
) -> None:
    with raises(code):
        converted(built_cache.url, tmp_path, **options)
    assert not (tmp_path / "converted").exists()


def test_unfinished_and_relabelled_sources_are_refused(tiny_cache: TinyCache, tmp_path: Path) -> None:
    relabel(tiny_cache.url)
    with raises("cache.source-relabelled"):
        converted(tiny_cache.url, tmp_path, encodings={"logits": "int8"})
    Path(tiny_cache.url, layout.MANIFEST).unlink()
    with raises("cache.unfinished"):
        converted(tiny_cache.url, tmp_path, encodings={"logits": "int8"})


def test_a_build_does_not_extend_a_derived_cache_and_a_derivation_no_build(
    built_cache: TinyCache, tmp_path: Path
) -> None:
    url = converted(built_cache.url, tmp_path, num_views=2)
    section = cache_section(built_cache.config).model_copy(update={"url": url})
    with raises("cache.derived"):
        build(built_cache.config.model_copy(update={"cache": section}))
    copied = copy_of(built_cache, tmp_path / "copy")
    with raises("cache.derived"):
        convert(built_cache.url, copied.url, encodings={}, num_views=2)
    with raises("cache.other-header"):
        convert(built_cache.url, url, encodings={"logits": "int8"})
    assert read_manifest(url)[0].num_views == 2


def die_at(patch: pytest.MonkeyPatch, number: int) -> None:
    """From this write on, every write ends the process; a log is not counted."""
    calls = iter(range(10**9))

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def write(*args: Any) -> Any:
            if not any(f"/{layout.LOG}/" in str(arg) for arg in args) and next(calls) >= number:
                raise KilledError
            return original(*args)

        return write

    for name in ("put", "create", "write"):
        patch.setattr(storage, name, dying(getattr(storage, name)))


@pytest.mark.parametrize("number", [1, 4, slow(9), 15, slow(21), 24])
def test_a_killed_conversion_is_no_cache_and_continues_to_the_same_bytes(
    int8_cache: TinyCache, tmp_path: Path, number: int
) -> None:
    options = {"encodings": {"logits": "fp16"}}
    expected = files(converted(int8_cache.url, tmp_path / "whole", **options))
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, number)
        with pytest.raises(KilledError):
            converted(int8_cache.url, tmp_path, **options)
    url = str(tmp_path / "converted")
    assert not storage.exists(storage.join(url, layout.MANIFEST))
    commits = {path: data for path, data in files(url).items() if path.startswith("commits/")}
    url = converted(int8_cache.url, tmp_path, **options)
    assert files(url) == expected
    assert commits.items() <= expected.items()
    assert not storage.listing(storage.join(url, layout.LOG))


def test_files_that_were_removed_after_their_commit_are_made_again(int8_cache: TinyCache, tmp_path: Path) -> None:
    url = converted(int8_cache.url, tmp_path, encodings={"logits": "fp16"})
    expected = files(url)
    for folder in ("parts", "index", "means"):
        next(Path(url, folder).rglob("*.parquet")).unlink()
    assert files(converted(int8_cache.url, tmp_path, encodings={"logits": "fp16"})) == expected


def test_a_damaged_source_part_stops_the_conversion(tiny_cache: TinyCache, tmp_path: Path) -> None:
    part = next(Path(tiny_cache.url, "parts").rglob("v*.parquet"))
    data = bytearray(part.read_bytes())
    data[100] ^= 1
    part.write_bytes(bytes(data))
    with raises("cache.changed-file"):
        converted(tiny_cache.url, tmp_path, encodings={"logits": "int8"})


def test_columns_that_this_version_does_not_know_are_carried_over(tiny_cache: TinyCache, tmp_path: Path) -> None:
    def add(table: pa.Table) -> pa.Table:
        values = pa.array([f"row {row}".encode() for row in range(len(table))], pa.large_binary())
        return table.append_column(pa.field("further", pa.large_binary(), nullable=False), values)

    rewrite_view(tiny_cache, "digits-00", 2, add)
    url = converted(tiny_cache.url, tmp_path, encodings={"logits": "int8"})
    assert stored_rows(url, "digits-00", 2, "further") == [f"row {row}".encode() for row in range(20)]


@pytest.mark.parametrize("pixels", ["jpeg:90", slow("raw")])
def test_stored_views_are_carried_over(tiny_config: TinyConfig, tmp_path: Path, pixels: str) -> None:
    views = {"kind": "crop", "count": 2, "pixels": pixels}
    source = tiny_config(views=views)
    direct = tiny_config(views=views, cache={"url": str(tmp_path / "direct"), "logits": "int8"})
    for config in (source, direct):
        build(config)
    url = converted(cache_section(source).url, tmp_path, encodings={"logits": "int8"})
    got, expected = files(url), files(str(tmp_path / "direct"))
    assert {path for path in got if got[path] != expected.get(path)} == RECORDS
    assert compared(url, cache_section(source).url).ok


def test_a_changed_row_of_a_derived_cache_is_found_only_by_its_source(int8_cache: TinyCache, tmp_path: Path) -> None:
    url = converted(int8_cache.url, tmp_path, encodings={"logits": "fp16"})
    cache = TinyCache(url, int8_cache.config)
    rewrite_view(cache, "digits-01", 2, set_cell("logits", 4, lambda row: row[2:] + row[:2]))
    assert verify_cache(url).ok
    report = compared(url, int8_cache.url)
    assert [(problem.shard, problem.view, problem.rows) for problem in report.problems] == [("digits-01", 2, 1)]
    assert "logits" in report.problems[0].what


def test_other_sources_and_caches_without_sources_are_refused(
    built_cache: TinyCache, int8_cache: TinyCache, tmp_path: Path
) -> None:
    url = converted(int8_cache.url, tmp_path, encodings={"logits": "fp16"})
    with raises("cache.other-source"):
        compared(url, built_cache.url)
    with raises("cache.not-derived"):
        compared(built_cache.url, int8_cache.url)


def test_derived_caches_can_be_copied_inspected_and_converted_again(int8_cache: TinyCache, tmp_path: Path) -> None:
    url = converted(int8_cache.url, tmp_path, encodings={"logits": "fp16"})
    copy_cache(url, str(tmp_path / "copy"))
    assert compared(str(tmp_path / "copy"), int8_cache.url).ok
    derived = inspect_cache(url).derived
    assert derived is not None
    assert "logits int8 -> fp16" in derived
    assert inspect_cache(int8_cache.url).derived is None


def test_a_source_that_was_extended_meanwhile_is_another_source(tiny_cache: TinyCache, tmp_path: Path) -> None:
    url = converted(tiny_cache.url, tmp_path, num_views=2)
    views = tiny_cache.config.views.model_copy(update={"count": 4})
    config = tiny_cache.config.model_copy(update={"views": views})
    build_part(open_tasks(config)[0])
    # Commits that are not in the manifest do not count.
    assert convert(tiny_cache.url, url, encodings={}, num_views=2).num_views == 2
    assert len(read_commits(url)) == 4
    build(config)
    with raises("cache.derived"):
        convert(tiny_cache.url, url, encodings={}, num_views=2)
