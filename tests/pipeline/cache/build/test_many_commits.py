"""Caches of many shards: few commits are in memory, and their fold is that of all commits."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import storage
from pipeline.cache.build.commit import CommitSummary, read_commit_summaries, stream_commits
from pipeline.cache.build.fold import fold_commits
from pipeline.cache.format import layout
from pipeline.cache.read.reader import PartsIndex
from pipeline.core.hashing import seal
from pipeline.tasks.classification import Classification
from schemas.cache_format import ByteRange, Commit, FileRef, Statistics, ViewBlock, ViewRange

_NUM_SHARDS = 300
TASK = Classification()


def commit_of(shard: str, start: int, stop: int, *, is_eval: bool = False, hits: int = 1) -> Commit:
    block = ViewBlock(start=start, stop=stop, is_eval=is_eval)
    views = tuple(ViewRange(view=view, offset=view, size_bytes=7, rows=3, digest=f"d{view}") for view in block.views)
    return Commit(
        fingerprint="f",
        shard_id=shard,
        shard_size_bytes=100,
        block=block,
        part=FileRef(path=f"parts/{shard}/{block.name}", sha256="p", size_bytes=50),
        index=FileRef(path=layout.index_path(shard), sha256="i", size_bytes=9),
        means=FileRef(path=f"means/{shard}", sha256="m", size_bytes=9) if start == 0 else None,
        num_ok=3,
        read=4,
        written=3,
        skipped={"empty": 1},
        views=views,
        footer=ByteRange(offset=40, size_bytes=10, digest="e"),
        statistics=Statistics(labelled=3, top1_hits=hits, class_counts={hits % 5: 3}, kl_sum={"1.0": 0.1 * hits}),
        environment={"device": "cpu"},
    )


@pytest.fixture
def many(tmp_path: Path) -> str:
    for number in range(_NUM_SHARDS):
        commit = commit_of(f"s-{number:03d}", 0, 2, hits=number)
        target = tmp_path / layout.commit_path(commit.shard_id, commit.block)
        target.parent.mkdir(parents=True)
        target.write_bytes(seal(commit.model_dump(mode="json")))
    return str(tmp_path)


def alive() -> int:
    gc.collect()
    return sum(type(item) is Commit for item in gc.get_objects())


@pytest.mark.slow
def test_commits_come_in_order_and_few_of_them_are_in_memory_at_once(many: str) -> None:
    before, peak, shards = alive(), 0, list[str]()
    for number, commit in enumerate(stream_commits(many)):
        shards.append(commit.shard_id)
        if number % 100 == 50:
            peak = max(peak, alive() - before)
    assert shards == [f"s-{number:03d}" for number in range(_NUM_SHARDS)]
    assert peak < _NUM_SHARDS // 3


@pytest.mark.slow
def test_a_fold_and_a_plan_hold_no_commit(many: str) -> None:
    before = alive()
    summaries = read_commit_summaries(many)
    fold = fold_commits(stream_commits(many), [commit.shard_id for commit in summaries], TASK)
    assert alive() == before
    assert (fold.totals["num_shards"], fold.totals["num_views"], len(fold.parts)) == (_NUM_SHARDS, 2, 2 * _NUM_SHARDS)


def test_a_summary_has_the_fields_of_its_commit() -> None:
    summary = CommitSummary.of(commit_of("s", 0, 2))
    assert summary == CommitSummary(
        shard_id="s",
        shard_size_bytes=100,
        block=ViewBlock(start=0, stop=2),
        part="parts/s/v0000-0001",
        part_size_bytes=50,
        index="index/s.parquet",
        index_sha256="i",
        means="means/s",
        num_ok=3,
        num_rows=6,
    )
    assert CommitSummary.of(commit_of("s", 2, 4)).means is None
    assert CommitSummary.of(commit_of("t", 0, 2)).block is summary.block


@pytest.mark.parametrize("rows_at_once", [1, 3, 1000])
def test_the_table_of_parts_is_the_same_however_it_is_packed(
    monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    monkeypatch.setattr("pipeline.cache.build.fold.ROWS_PER_BATCH", rows_at_once)
    commits = [commit_of(shard, start, start + 2) for shard in ("a", "b") for start in (0, 2, 4)]
    rows = fold_commits(commits, ["a", "b"], TASK).parts.to_pylist()
    assert [(row["shard_id"], row["view"], row["digest"]) for row in rows] == [
        (shard, view, f"d{view}") for shard in ("a", "b") for view in range(6)
    ]
    assert {(row["path"], row["offset"]) for row in rows if row["view"] == 3} == {
        ("parts/a/v0002-0003", 3),
        ("parts/b/v0002-0003", 3),
    }


@given(st.dictionaries(st.sampled_from("abc"), st.sets(st.integers(0, 9)), min_size=1))
def test_views_are_complete_up_to_the_first_that_some_shard_lacks(views: dict[str, set[int]]) -> None:
    def commits() -> Iterator[Commit]:
        for shard, numbers in sorted(views.items()):
            yield commit_of(shard, 0, 1, is_eval=True)
            yield from (commit_of(shard, number, number + 1) for number in sorted(numbers))

    common = set[int].intersection(*views.values())
    first = next(view for view in range(11) if view not in common)
    assert fold_commits(commits(), list(views), TASK).totals["num_views"] == first


def test_counts_are_added_over_commits_and_samples_over_shards() -> None:
    commits = [commit_of("a", 0, 1, hits=1), commit_of("a", 1, 2, hits=6), commit_of("b", 0, 2, hits=3)]
    totals = fold_commits(commits, ["b", "a"], TASK).totals
    assert (totals["num_samples"], totals["num_ok"], totals["skipped"]) == (8, 6, {"empty": 2})
    assert totals["size_bytes"] == 150
    statistics = totals["statistics"]
    assert (statistics.labelled, statistics.top1_hits, statistics.class_counts) == (9, 10, {1: 6, 3: 3})
    assert statistics.kl_sum["1.0"] == pytest.approx(1.0)
    assert statistics.kl_sum["2.0"] == 0


@given(st.sets(st.tuples(st.sampled_from(["a", "b", "b-1", "c"]), st.sampled_from([0, 1, 7, 255, 256, 65_535]))))
def test_the_table_of_parts_is_indexed_by_shard_and_view(keys: set[tuple[str, int]]) -> None:
    rows = [{"shard_id": shard, "view": view, "path": f"{shard}/{view}"} for shard, view in keys]
    types = {"shard_id": pa.string(), "view": pa.uint16(), "path": pa.string()}
    schema = pa.schema(types)
    table = pa.Table.from_pylist(rows, schema)
    # Two chunks with a dictionary each, like a file of several row groups.
    half = len(table) // 2
    chunked = pa.concat_tables(
        chunk.set_column(0, "shard_id", chunk["shard_id"].combine_chunks().dictionary_encode())
        for chunk in (table.slice(0, half), table.slice(half))
    )
    index = PartsIndex.of(chunked)
    for shard in ("a", "b", "b-1", "c", "absent"):
        for view in (0, 1, 2, 7, 255, 256, 65_534, 65_535):
            entry = index.entry(shard, view)
            assert (entry is not None) == ((shard, view) in keys)
            assert entry is None or entry["path"] == f"{shard}/{view}"


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_the_files_of_a_folder_are_listed_with_their_sizes(tmp_path: Path, scheme: str) -> None:
    folder = f"{tmp_path}/below" if scheme == "file" else f"memory://{tmp_path.name}/below"
    assert storage.sizes_in_folder(folder) == {}
    for name in ("a.tar", "b.tar", "deeper/c.tar"):
        storage.write(f"{folder}/{name}", b"x" * len(name))
    assert storage.sizes_in_folder(folder) == {"a.tar": 5, "b.tar": 5}
