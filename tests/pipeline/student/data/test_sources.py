"""The join: cached outputs belong to exactly the row that they are joined with, or training stops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache.read.reader import ViewColumns, open_cache
from pipeline.core.errors import CacheError
from pipeline.shards.index import STATUSES, ShardIndex
from pipeline.student.data.join import check_alignment
from pipeline.student.data.memo import Memo
from pipeline.student.data.sources import open_cached, open_indexed
from pipeline.tasks.classification import Classification
from tests.errors import raises
from tests.pipeline.caches import shard_urls
from tests.pipeline.student.conftest import Replay
from tests.pipeline.student.runs import cached_source, index_shards, rewrite_view, set_cell, set_column

LAW = settings(max_examples=100, deadline=None)
OK_ROWS = [0, 2, 3, 4, 6, 7]
ALL = np.arange(20, dtype=np.int32)


def index() -> ShardIndex:
    """Eight samples, of which the second and the sixth cannot be used."""
    status = np.full(8, STATUSES.index("ok"), np.uint8)
    status[[1, 5]] = STATUSES.index("undecodable")
    zeros = np.zeros(8, np.int32)
    return ShardIndex(
        shard_id="shard",
        keys=pa.array([f"key{row}" for row in range(8)]),
        status=status,
        task=Classification(),
        targets=Classification().rows([None] * 8),
        offset=zeros.astype(np.int64),
        size=zeros,
        width=zeros,
        height=zeros,
        content_hash=np.arange(100, 108).astype(np.uint64),
    )


def columns(rows: list[int]) -> ViewColumns:
    row_N = np.array(rows, np.int32)
    nothing = np.zeros(len(rows), np.float32)
    return ViewColumns(
        row_N=row_N,
        content_hash_N=(row_N + 100).astype(np.uint64),
        box_N4=np.zeros((len(rows), 4), np.int32),
        flip_N=nothing.astype(np.bool_),
        mix_row_N=np.full(len(rows), 0, np.int32),
        mix_lambda_N=nothing,
        aug_params={},
        embedding_norm_N=nothing,
        outputs={},
        pixel_digest=(None,) * len(rows),
        pixel_mean=(None,) * len(rows),
    )


def test_the_ok_rows_in_tar_order_are_aligned() -> None:
    check_alignment(columns(OK_ROWS), index(), where="here")


@pytest.mark.parametrize(
    ("rows", "got"),
    [
        ([0, 2, 3, 4, 6], "5 rows: missing [7]"),
        ([0, 2, 3, 3, 4, 6, 7], "7 rows: repeated [3]"),
        ([0, 2, 3, 3, 6, 7], "6 rows: missing [4], repeated [3]"),
        ([0, 3, 2, 4, 6, 7], "6 rows: the right ones in another order"),
        ([0, 1, 2, 3, 4, 6, 7], "7 rows: foreign [1]"),
        ([0, 2, 3, 4, 6, 9], "6 rows: missing [7], foreign [9]"),
        ([], "0 rows: missing [0, 2, 3, 4, 6]"),
    ],
)
def test_rows_that_are_not_the_shards_are_named_by_kind_and_number(rows: list[int], got: str) -> None:
    with raises("cache.rows-mismatch") as caught:
        check_alignment(columns(rows), index(), where="view 3 of shard")
    assert (caught.value.where, caught.value.got) == ("view 3 of shard", got)


@LAW
@given(st.lists(st.integers(0, 8), max_size=8))
def test_no_other_list_of_rows_passes(rows: list[int]) -> None:
    if rows == OK_ROWS:
        return
    with pytest.raises(CacheError):
        check_alignment(columns(rows), index(), where="here")


def test_a_foreign_content_hash_is_reported_with_its_sample() -> None:
    cached = columns(OK_ROWS)
    cached.content_hash_N[3] = 255
    got, expected = f"content hash {255:016x}", f"{104:016x}"
    with raises("cache.other-images", where="here, shard/key4", got=got, expected=expected):
        check_alignment(cached, index(), where="here")


@pytest.mark.parametrize("mix_row", [1, 5, 8, -1])
def test_a_partner_that_is_no_ok_row_is_refused(mix_row: int) -> None:
    cached = replace(columns(OK_ROWS), mix_row_N=np.array([0, mix_row, 0, 0, 0, 0], np.int32))
    with raises("cache.foreign-partner"):
        check_alignment(cached, index(), where="here")


def dropped(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table.slice(0, 5), table.slice(6)])


def repeated(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table.slice(0, 6), table.slice(5)])


def reordered(table: pa.Table) -> pa.Table:
    return table.take([*range(18), 19, 18])


def with_neighbours_outputs(table: pa.Table) -> pa.Table:
    """Every row has the outputs of the next row: the classic silent bug."""
    return set_column(table.take([*range(1, 20), 0]), "row", table["row"].to_pylist())


TAMPERED: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "dropped": (dropped, "cache.rows-mismatch"),
    "repeated": (repeated, "cache.rows-mismatch"),
    "reordered": (reordered, "cache.rows-mismatch"),
    "shifted": (with_neighbours_outputs, "cache.other-images"),
    "renumbered": (set_cell("row", 4, 40), "cache.rows-mismatch"),
    "other content": (set_cell("content_hash", 4, lambda content: content ^ 1), "cache.other-images"),
    "foreign partner": (set_cell("mix_row", 4, 400), "cache.foreign-partner"),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_tampered_part_whose_digests_are_right_stops_at_the_join(replay_copy: Replay, how: str) -> None:
    change, code = TAMPERED[how]
    cache = replay_copy("crop")
    rewrite_view(cache, "digits-00", 5, change)
    source = cached_source(cache)
    source.rows(0, ALL, 4)
    with raises(code) as caught:
        source.rows(0, ALL, 5)
    assert f"view 5 of digits-00 in {cache.url}" in str(caught.value.where)


def test_another_shards_part_stops_at_the_join(replay_copy: Replay) -> None:
    """Same rows, same views, same teacher: they differ only in content."""
    cache = replay_copy("crop")
    hashes = [*open_cache(cache.url).view("digits-01", 0).content_hash_N.tolist(), *[0] * 5]
    rewrite_view(cache, "digits-00", 0, lambda table: set_column(table, "content_hash", hashes))
    with raises("cache.other-images"):
        cached_source(cache).rows(0, ALL, 0)


def test_shards_of_the_config_stand_in_for_those_of_the_manifest(replays: Replay, tmp_path: Path) -> None:
    cache = replays("crop")
    (url,) = [url for name, url in shard_urls(cache.config).items() if name == "digits-01"]
    moved = tmp_path / "digits-01.tar"
    moved.write_bytes(Path(url).read_bytes())
    opened = open_cache(cache.url)
    source = open_cached([opened], cache.config.data.model_copy(update={"shards": str(moved)}))
    assert (source.shard_ids, source.num_ok) == (["digits-01"], [15])
    assert open_cached([opened], cache.config.data.model_copy(update={"shards": None})).shard_ids == [
        "digits-00",
        "digits-01",
    ]
    rows = source.rows(0, ALL[:1], 0)
    (byte_range,) = rows.byte_ranges
    assert source.files.image(0, byte_range, sample_id="first", max_pixels=10**6).shape[0] == 3
    source.close()


def test_a_shard_that_the_cache_does_not_hold_is_named(replays: Replay) -> None:
    cache = replays("crop")
    with raises("cache.missing-shards", got="other-07"):
        open_cached([open_cache(cache.url)], cache.config.data.model_copy(update={"shards": "other-07.tar"}))


def test_shards_without_an_index_are_refused_with_the_command_that_builds_it(replays: Replay, tmp_path: Path) -> None:
    config = replays("crop").config
    with raises("shard.no-index"):
        open_indexed(str(tmp_path), config.data, config.views)


def test_an_index_built_with_other_settings_is_refused(replays: Replay, tmp_path: Path) -> None:
    config = replays("crop").config
    index_shards(config, tmp_path)
    other = config.data.model_copy(update={"num_classes": 11})
    with pytest.raises(CacheError) as caught:
        open_indexed(str(tmp_path), other, config.views)
    assert caught.value.got == "num_classes: 10 -> 11"


def test_a_memo_stores_the_last_used_results_and_releases_the_others() -> None:
    computed: list[int] = []
    released: list[str] = []
    memo = Memo(lambda key: computed.append(key) or str(key), 2, released.append)
    for key in (1, 2, 1, 3, 1, 2):
        assert memo[key] == str(key)
    assert computed == [1, 2, 3, 2]
    assert released == ["2", "3"]
    memo.clear()
    assert released == ["2", "3", "1", "2"]
