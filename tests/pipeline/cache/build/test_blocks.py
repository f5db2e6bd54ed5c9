"""Which blocks of views a shard lacks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cache.build.blocks import BlockPlan, holds_class_sums
from pipeline.core.errors import CacheError
from schemas.cache_format import ViewBlock

EVAL = ViewBlock(start=0, stop=1, is_eval=True)


def block(start: int, stop: int) -> ViewBlock:
    return ViewBlock(start=start, stop=stop)


def missing(*committed: ViewBlock, num_views: int, views_per_part: int, has_eval: bool = False) -> list[str]:
    return [block.name for block in BlockPlan(num_views, views_per_part, has_eval).missing(committed, where="s")]


def test_a_new_shard_lacks_every_block_and_the_eval_pass() -> None:
    names = missing(num_views=5, views_per_part=2, has_eval=True)
    assert names == ["eval", "v0000-0001", "v0002-0003", "v0004-0004"]


def test_a_gap_is_filled_without_touching_committed_blocks() -> None:
    assert missing(block(0, 2), block(5, 6), num_views=8, views_per_part=2) == [
        "v0002-0003",
        "v0004-0004",
        "v0006-0007",
    ]


def test_added_views_start_at_the_first_uncovered_view_for_any_block_size() -> None:
    assert missing(block(0, 3), num_views=8, views_per_part=4) == ["v0003-0006", "v0007-0007"]


def test_a_shard_with_more_views_than_planned_is_complete() -> None:
    assert missing(block(0, 5), EVAL, num_views=2, views_per_part=5, has_eval=True) == []


def test_overlapping_commits_are_refused() -> None:
    with pytest.raises(CacheError) as caught:
        missing(block(0, 3), block(2, 4), num_views=4, views_per_part=2)
    assert (caught.value.code, caught.value.where, caught.value.got) == ("cache.overlapping-commits", "s", "view 2")


def test_shards_without_a_commit_share_their_blocks() -> None:
    plan = BlockPlan(num_views=4, views_per_part=2, has_eval=False)
    blocks = plan.missing_by_shard(["a", "b", "c"], [("b", block(0, 2)), ("z", block(0, 1))], cache_url="u")
    assert {shard: [block.name for block in of_shard] for shard, of_shard in blocks.items()} == {
        "a": ["v0000-0001", "v0002-0003"],
        "b": ["v0002-0003"],
        "c": ["v0000-0001", "v0002-0003"],
    }
    assert blocks["a"] is blocks["c"]


@given(st.sets(st.integers(0, 30)), st.integers(1, 31), st.integers(1, 7))
def test_the_missing_blocks_cover_each_remaining_view_once(committed: set[int], num_views: int, size: int) -> None:
    before = [block(view, view + 1) for view in sorted(committed)]
    blocks = BlockPlan(num_views, size, has_eval=False).missing(before, where="s")
    added = [view for block in blocks for view in block.views]
    assert sorted([*added, *(view for view in committed if view < num_views)]) == list(range(num_views))
    assert all(1 <= len(block.views) <= size for block in blocks)


@pytest.mark.parametrize(
    ("class_means", "expected"),
    [("eval", [True, False, False]), ("view0", [False, True, False]), ("none", [False] * 3), (None, [False] * 3)],
)
def test_one_block_of_a_shard_holds_its_class_sums(class_means: str | None, expected: list[bool]) -> None:
    assert [holds_class_sums(class_means, block) for block in (EVAL, block(0, 3), block(3, 5))] == expected
