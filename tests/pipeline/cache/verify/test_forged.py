"""Faults that no digest reveals: files with other content under correct names, and records that agree with them."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.cache.build.commit import publish_file
from pipeline.cache.build.manifest import publish_manifest
from pipeline.cache.format import layout
from pipeline.cache.format.codec import encode
from pipeline.cache.format.header import read_header
from pipeline.cache.ops.gc import collect_garbage
from pipeline.cache.verify import Problem, VerifyReport, verify_cache
from pipeline.cache.verify.shard import SHARD_MISSING
from pipeline.core.hashing import digest, seal
from schemas.cache_format import FileRef, Header
from tests.pipeline.cache.verify.forge import commit_of, replace_commit, republish, rewrite_part, set_cell
from tests.pipeline.caches import TinyCache, build, copy_of, files, read_commits, shard_urls
from tests.pipeline.conftest import TinyConfig

SHARD, BLOCK = "digits-01", "v0000-0001"

pytestmark = pytest.mark.slow


def only(report: VerifyReport) -> Problem:
    """The only problem."""
    assert report.num_problems == 1, report.problems
    return report.problems[0]


def forged(cache: TinyCache, change: Callable[[pa.Table], pa.Table], block: str = BLOCK) -> VerifyReport:
    rewrite_part(cache, commit_of(cache, SHARD, block), change)
    republish(cache)
    return verify_cache(cache.url)


def test_a_part_written_again_without_a_change_is_no_problem(cache: TinyCache) -> None:
    assert forged(cache, lambda table: table).ok


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("box_left", 1),
        ("box_top", 1),
        ("box_width", 3),
        ("box_height", 3),
        ("flip", None),
        ("mix_row", 0),
        ("mix_lambda", 0.75),
        ("row", 14),
        ("content_hash", 7),
    ],
)
def test_an_augmentation_parameter_that_differs_from_the_plan_is_found_with_its_row(
    cache: TinyCache, name: str, value: object
) -> None:
    # Row 17 of the part is the third of view 1.
    def change(table: pa.Table) -> pa.Table:
        old = table[name][17].as_py()
        return set_cell(table, name, 17, (not old) if value is None else old + 1 if value == old else value)

    problem = only(forged(cache, change))
    assert problem.file.startswith(f"parts/{SHARD}/{BLOCK}")
    assert name in problem.what
    assert (problem.shard, problem.view, problem.key, problem.rows) == (SHARD, 1, "digit-0022", 1)


def test_a_part_of_another_shard_does_not_match_the_index(cache: TinyCache) -> None:
    first, second = commit_of(cache, "digits-00", "eval"), commit_of(cache, "digits-01", "eval")
    short = pq.read_table(storage.join(cache.url, first.part.path)).slice(0, 15)
    rewrite_part(cache, second, lambda _: short)
    republish(cache)
    report = verify_cache(cache.url)
    assert {"row does not match the index and the plan", "content_hash does not match the index and the plan"} <= {
        problem.what for problem in report.problems
    }


def test_rows_in_another_order_are_found(cache: TinyCache) -> None:
    report = forged(cache, lambda table: table.take([*range(13), 14, 13, *range(15, 30)]))
    assert ("row does not match the index and the plan", "digit-0033", 2) in {
        (problem.what, problem.key, problem.rows) for problem in report.problems
    }


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_found(cache: TinyCache, value: float) -> None:
    logits = read_header(cache.url).output("logits")
    assert logits is not None
    cell = np.array([value, *range(9)], np.float32).tobytes()
    problem = only(forged(cache, lambda table: set_cell(table, "logits", 3, cell)))
    assert (problem.what, problem.key, problem.rows) == ("logits has NaN or infinity", "digit-0023", 1)


@pytest.mark.parametrize("value", [-1.0, np.nan])
def test_a_negative_or_infinite_norm_is_found(cache: TinyCache, value: float) -> None:
    report = forged(cache, lambda table: set_cell(table, "embedding_norm", 0, value))
    assert "embedding_norm is negative or not finite" in {problem.what for problem in report.problems}


def test_a_norm_that_does_not_match_the_embedding_is_found(cache: TinyCache) -> None:
    def change(table: pa.Table) -> pa.Table:
        return set_cell(table, "embedding_norm", 20, table["embedding_norm"][20].as_py() * 1.0001)

    problem = only(forged(cache, change))
    assert (problem.what, problem.key, problem.view) == ("embedding_norm does not match the embedding", "digit-0025", 1)


@pytest.mark.parametrize(
    ("row", "digest", "mean"),
    [(0, None, bytes(192)), (0, None, None), (7, bytes(16), bytes(192))],
    ids=["incomplete", "missing", "unexpected"],
)
def test_a_missing_incomplete_or_unexpected_canary_is_found(
    cache: TinyCache, row: int, digest: bytes | None, mean: bytes | None
) -> None:
    def change(table: pa.Table) -> pa.Table:
        return set_cell(set_cell(table, "pixel_digest", row, digest), "pixel_mean", row, mean)

    problem = only(forged(cache, change))
    assert "canary" in problem.what
    assert (problem.view, problem.key) == (0, f"digit-{20 + row:04d}")


def test_other_pixels_are_found_with_the_largest_difference(cache: TinyCache) -> None:
    def change(table: pa.Table) -> pa.Table:
        mean = bytearray(table["pixel_mean"][0].as_py())
        mean[5] ^= 8
        return set_cell(set_cell(table, "pixel_mean", 0, bytes(mean)), "pixel_digest", 0, bytes(16))

    problem = only(forged(cache, change))
    assert problem.what == "this machine renders pixels that differ from the teacher's input"
    assert (problem.shard, problem.view, problem.key) == (SHARD, 0, "digit-0020")
    assert "differ by up to 8 of 255" in str(problem.got)


def test_logits_that_do_not_match_the_counted_hits_are_found(cache: TinyCache) -> None:
    def change(table: pa.Table) -> pa.Table:
        logits = read_header(cache.url).output("logits")
        assert logits is not None
        values = np.zeros((15, 10), np.float32)
        values[np.arange(15), 0] = 1
        return table.set_column(
            table.schema.get_field_index("logits"), table.schema.field("logits"), encode(values, logits)
        )

    report = forged(cache, change, block="eval")
    assert any("hits do not match the stored logits" in problem.what for problem in report.problems)


@pytest.mark.parametrize("key", ["top1_hits", "top5_hits", "labelled"])
@pytest.mark.parametrize("added", [-1, 1])
def test_a_hit_count_that_is_off_by_one_is_found(cache: TinyCache, key: str, added: int) -> None:
    commit = commit_of(cache, SHARD, "eval")
    value = getattr(commit.statistics, key) + added
    replace_commit(cache, commit.model_copy(update={"statistics": commit.statistics.model_copy(update={key: value})}))
    republish(cache)
    assert only(verify_cache(cache.url)).file == commit.part.path


def test_embeddings_that_do_not_match_the_class_sums_are_found(cache: TinyCache) -> None:
    def change(table: pa.Table) -> pa.Table:
        # Rows of two classes; each keeps its norm.
        cells = table["embedding"].to_pylist()
        norms = table["embedding_norm"].to_pylist()
        cells[0], cells[1], norms[0], norms[1] = cells[1], cells[0], norms[1], norms[0]
        for name, values in (("embedding", cells), ("embedding_norm", norms)):
            field = table.schema.field(name)
            table = table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))
        return table

    problem = only(forged(cache, change, block="eval"))
    assert problem.file.startswith(f"means/{SHARD}/")
    assert problem.what == "whether the sums equal those of the part's embeddings"


@pytest.mark.parametrize(
    "update",
    [
        {"fingerprint": "0" * 16},
        {"shard_size_bytes": 7},
        {"num_ok": 14, "written": 14, "read": 14},
        {"read": 16, "skipped": {"empty": 1}},
    ],
)
def test_a_commit_with_changed_fields_and_a_correct_digest_is_found(
    cache: TinyCache, update: dict[str, object]
) -> None:
    commit = commit_of(cache, SHARD, BLOCK)
    replace_commit(cache, commit.model_copy(update=update))
    report = verify_cache(cache.url)
    assert not report.ok
    assert {problem.file for problem in report.problems} & {
        f"commits/{SHARD}/{BLOCK}.json",
        f"commits/{SHARD}/v0002-0002.json",
        "manifest/shards.parquet",
        "index/digits-01.parquet",
    }


@pytest.mark.parametrize("key", ["labelled", "top1_hits", "class_counts", "fidelity_rows"])
def test_statistics_that_are_not_the_manifest_total_are_found(cache: TinyCache, key: str) -> None:
    commit = commit_of(cache, SHARD, "eval")
    value: object = {1: 15} if key == "class_counts" else 99
    replace_commit(cache, commit.model_copy(update={"statistics": commit.statistics.model_copy(update={key: value})}))
    assert "statistics is not the sum of the commits" in {problem.what for problem in verify_cache(cache.url).problems}


def test_a_commit_of_another_cache_is_found(cache: TinyCache, tiny_config: TinyConfig, tmp_path: Path) -> None:
    other = tiny_config(cache={"url": str(tmp_path / "other")}, teacher={"precision": "bf16"})
    build(other)
    foreign = Path(tmp_path, "other", "commits", SHARD, "eval.json")
    Path(cache.url, "commits", SHARD, "eval.json").write_bytes(foreign.read_bytes())
    report = verify_cache(cache.url)
    assert (f"commits/{SHARD}/eval.json", "this commit belongs to another teacher") in {
        (problem.file, problem.what) for problem in report.problems
    }


def test_a_commit_that_overlaps_another_commit_is_found(cache: TinyCache) -> None:
    commit = commit_of(cache, SHARD, BLOCK)
    block = commit.block.model_copy(update={"start": 1, "stop": 3})
    replace_commit(cache, commit.model_copy(update={"block": block}))
    assert f"commits/{SHARD}/v0001-0002.json" in {problem.file for problem in verify_cache(cache.url).problems}


def test_a_build_that_continued_after_the_manifest_is_no_problem(cache: TinyCache, grown_cache: TinyCache) -> None:
    before = _published(grown_cache)
    views = cache.config.views.model_copy(update={"count": 7})
    build(cache.config.model_copy(update={"views": views}))
    for path, data in before.items():
        Path(cache.url, path).write_bytes(data)
    report = verify_cache(cache.url)
    assert report.ok, report.problems
    assert report.checked["commits that are not in the manifest yet"] == 2
    assert report.checked["parts"] == 10


def _published(cache: TinyCache) -> dict[str, bytes]:
    names = ("manifest.json", "manifest/shards.parquet", "manifest/parts.parquet", "class_means.parquet")
    return {name: Path(cache.url, name).read_bytes() for name in names}


@pytest.mark.parametrize("section", ["views", "teacher"])
def test_a_header_whose_ids_are_not_the_hashes_of_its_content_is_found(cache: TinyCache, section: str) -> None:
    header = read_header(cache.url)
    changed = {**getattr(header, section), "seed": 5}
    body = header.model_copy(update={section: changed}).model_dump(mode="json")
    storage.write(storage.join(cache.url, "header.json"), seal(Header.model_validate(body).model_dump(mode="json")))
    republish(cache)
    assert "header.json" in {problem.file for problem in verify_cache(cache.url).problems}


def test_canaries_of_missing_shards_are_not_checked(cache: TinyCache, tmp_path: Path) -> None:
    missing = {shard: str(tmp_path / Path(url).name) for shard, url in shard_urls(cache.config).items()}
    report = verify_cache(cache.url, shard_urls=missing)
    assert report.ok
    assert "canaries" not in report.checked
    assert report.not_checked[SHARD_MISSING] >= 12


def test_canaries_are_checked_in_moved_shards(cache: TinyCache, tmp_path: Path) -> None:
    moved = {shard: shutil.copy(url, tmp_path) for shard, url in shard_urls(cache.config).items()}
    assert verify_cache(cache.url, shard_urls=moved).checked["canaries"] >= 12
    tar = bytearray(Path(moved[SHARD]).read_bytes())
    tar[tar.index(b"IDAT") + 20] ^= 1
    Path(moved[SHARD]).write_bytes(tar)
    report = verify_cache(cache.url, shard_urls=moved)
    assert {(problem.file, problem.shard) for problem in report.problems} == {(moved[SHARD], SHARD)}


def test_pixel_drift_within_the_allowed_levels_is_counted_and_no_problem(cache: TinyCache) -> None:
    def change(table: pa.Table) -> pa.Table:
        (mean,) = {value.as_py() for value in table["pixel_mean"].slice(0, 1)}
        moved = bytes([mean[0] + 3 if mean[0] < 128 else mean[0] - 3]) + mean[1:]
        return set_cell(set_cell(table, "pixel_digest", 0, bytes(16)), "pixel_mean", 0, moved)

    assert only(forged(cache, change)).got is not None
    report = verify_cache(cache.url, allowed_levels=3)
    assert report.ok
    assert report.drift == {3: 1}
    assert report.as_dict()["drift"] == {3: 1}
    assert not verify_cache(cache.url, allowed_levels=2).ok


def test_a_cache_without_mixing_and_embeddings_has_no_problem(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = tiny_config(
        views={"kind": "crop", "count": 2},
        cache={"logits": "fp16", "embeddings": "none", "class_means": "view0"},
    )
    build(config)
    report = verify_cache(str(tmp_path / "cache"))
    assert report.ok, report.problems
    assert report.checked["class sums"] == 2


def test_half_precision_embeddings_are_compared_with_their_norms(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = tiny_config(cache={"logits": "fp16", "embeddings": "fp16"})
    build(config)
    cache = TinyCache(str(tmp_path / "cache"), config)
    assert verify_cache(cache.url).ok
    copy = copy_of(cache, tmp_path / "copy")
    report = forged(
        copy, lambda table: set_cell(table, "embedding_norm", 4, table["embedding_norm"][4].as_py() * 1.002)
    )
    assert only(report).what == "embedding_norm does not match the embedding"


def swap_file(cache: TinyCache, data: bytes) -> VerifyReport:
    """Replaces a part by other bytes, under the correct name and digest."""
    commit = commit_of(cache, SHARD, BLOCK)
    local = Path(cache.url, "other")
    local.write_bytes(data)
    part = publish_file(cache.url, local, layout.part_path(SHARD, commit.block))
    local.unlink()
    # The ranges cover the file, so that only its content is wrong.
    first, second = commit.views
    first = first.model_copy(update={"offset": 4, "size_bytes": 1})
    second = second.model_copy(update={"offset": 5, "size_bytes": 1})
    footer = commit.footer.model_copy(update={"offset": 6, "size_bytes": len(data) - 6})
    replace_commit(cache, commit.model_copy(update={"part": part, "views": (first, second), "footer": footer}))
    republish(cache)
    return verify_cache(cache.url)


def test_a_part_that_is_not_parquet_or_lacks_columns_or_rows_is_one_problem(cache: TinyCache) -> None:
    intact = pq.read_table(storage.join(cache.url, commit_of(cache, SHARD, BLOCK).part.path))
    assert only(swap_file(cache, b"not a Parquet file")).code == "cache.unreadable-part"
    for table, code in (
        (intact.drop_columns("flip"), "cache.part-columns"),
        (intact.slice(0, 29), "cache.part-row-groups"),
        (intact, "cache.part-row-groups"),
    ):
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        assert only(swap_file(cache, sink.getvalue().to_pybytes())).code == code


def test_a_file_without_class_sums_is_one_problem(cache: TinyCache) -> None:
    commit = commit_of(cache, SHARD, "eval")
    local = Path(cache.url, "other")
    pq.write_table(pa.table({"class": [1]}), local)
    means = publish_file(cache.url, local, layout.means_path(SHARD, commit.block))
    local.unlink()
    replace_commit(cache, commit.model_copy(update={"means": means}))
    problem = only(verify_cache(cache.url))
    assert (problem.file, problem.code) == (means.path, "cache.invalid-class-sums")


def test_a_cache_in_object_storage_is_verified_and_cleaned_like_a_local_one(cache: TinyCache) -> None:
    url = f"memory://verify-{uuid.uuid4().hex}"
    for path, data in files(cache.url).items():
        storage.write(storage.join(url, path), data)
    storage.write(storage.join(url, "parts/digits-01/eval.0123456789abcdef.parquet"), b"stray")
    assert collect_garbage(url, min_age_s=0, now_s=time.time() + 1).freed_bytes == 5
    assert verify_cache(url, threads=3) == replace(verify_cache(cache.url), url=url)


def test_commits_of_shards_outside_the_manifest_are_no_problem(cache: TinyCache) -> None:
    urls = shard_urls(cache.config)
    publish_manifest(cache.url, {SHARD: urls[SHARD]})
    report = verify_cache(cache.url)
    assert report.ok, report.problems
    assert report.checked["commits that are not in the manifest yet"] == 4
    assert report.checked["parts"] == 8


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("key", "digit-0021", "duplicate keys"),
        ("label", 10, "targets out of range"),
        ("size", 1 << 30, "byte ranges outside of the shard"),
        ("width", 0, "images without a size"),
        ("status", "empty", "samples skipped"),
    ],
)
def test_an_inconsistent_index_is_found(cache: TinyCache, name: str, value: object, what: str) -> None:
    path = layout.index_path(SHARD)
    table = set_cell(pq.read_table(storage.join(cache.url, path)), name, 3, value)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    data = sink.getvalue().to_pybytes()
    storage.write(storage.join(cache.url, path), data)
    ref = FileRef(path=path, sha256=digest(data), size_bytes=len(data))
    for commit in read_commits(cache.url):
        if commit.shard_id == SHARD:
            replace_commit(cache, commit.model_copy(update={"index": ref}))
    republish(cache)
    assert (path, what) in {(problem.file, problem.what) for problem in verify_cache(cache.url).problems}
