"""The order of training: laws over shards, batches, world sizes and tails."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.augment.params import mix_partners
from pipeline.student.data.epoch_order import EpochOrder, OrderedRows
from pipeline.student.data.order import TrainingOrder, order_of
from schemas.config import TrainConfig, ViewsConfig
from tests.errors import raises
from tests.marks import slow

WORLD_SIZES = (1, 2, 3, 4, 8)
Row = tuple[int, int]
View = tuple[int, int, int]
"""Shard, row, position among the views of the epoch."""
# Frozen: another value here is another format.
FROZEN_ORDER = [[(2, 0), (2, 4), (1, 1), (1, 2)], [(2, 1), (0, 1), (1, 0), (1, 3)], [(2, 2), (2, 3), (0, 0), (0, 2)]]


def build(num_ok: list[int], global_batch_size: int, **changes: Any) -> TrainingOrder:
    names = [f"train-{number:05d}" for number in range(len(num_ok))]
    plan, num_views = changes.pop("plan", ViewsConfig(kind="crop")), changes.pop("num_views", None)
    train = TrainConfig.model_validate({"global_batch_size": global_batch_size, "tail": "short", **changes})
    return order_of(train, names, num_ok, plan, num_views=num_views)


def pairs_of(rows: OrderedRows) -> list[Row]:
    return list(zip(rows.shard_B.tolist(), rows.row_B.tolist(), strict=True))


def views_of(rows: OrderedRows) -> list[View]:
    return list(zip(rows.shard_B.tolist(), rows.row_B.tolist(), rows.view_B.tolist(), strict=True))


def batch_of_views(epoch: EpochOrder, step: int, world_size: int) -> list[View]:
    return [view for rank in range(world_size) for view in views_of(epoch.rows(step, rank, world_size))]


def global_batch(epoch: EpochOrder, step: int, world_size: int) -> list[Row]:
    return [row for rank in range(world_size) for row in pairs_of(epoch.rows(step, rank, world_size))]


def all_rows(epoch: EpochOrder, world_size: int = 1) -> list[Row]:
    return [row for step in range(epoch.order.num_steps) for row in global_batch(epoch, step, world_size)]


def every_row(order: TrainingOrder) -> set[Row]:
    return {(shard, row) for shard, count in enumerate(order.num_ok_S.tolist()) for row in range(count)}


@dataclass(frozen=True)
class Case:
    order: TrainingOrder
    epoch: int
    view: int
    world_size: int

    @property
    def fresh(self) -> EpochOrder:
        """An order that has built no lane yet."""
        return self.order.epoch(self.epoch, self.view)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_ok = draw(st.lists(st.integers(0, 40), min_size=1, max_size=9))
    assume(sum(num_ok) > 0)
    world_size = draw(st.sampled_from(WORLD_SIZES))
    mixed, tail = draw(st.booleans()), draw(st.sampled_from(["drop", "short"]))
    views_per_image = draw(st.sampled_from([1, 1, 2, 3]))
    lanes = world_size * draw(st.integers(1, 3)) + draw(st.integers(0, 2))
    batch = lanes * (2 if mixed else 1) * views_per_image * draw(st.integers(1, 3))
    rows = sum(num_ok) * views_per_image
    assume(tail == "short" or rows % batch <= 0.05 * rows < rows - batch)
    plan = ViewsConfig(
        kind="function_matching" if mixed else "crop",
        count=5,
        mix_group=draw(st.sampled_from([2, 5, 8, 256])),
        mix_repeat=views_per_image * draw(st.integers(1, 2)) if mixed else 1,
    )
    kind, seed = draw(st.sampled_from(["global", "pinned"])), draw(st.integers(0, 2**62))
    keys = {"seed": seed, "lanes": lanes, "order": kind, "tail": tail, "views_per_image": views_per_image}
    order = build(num_ok, batch, plan=plan, **keys)
    return Case(order, draw(st.integers(0, 9)), draw(st.integers(0, 2**40)), world_size)


LAW = settings(max_examples=60, deadline=None)


@given(cases())
@LAW
def test_an_epoch_has_each_view_of_each_row_once_in_full_steps_and_a_last_one_of_what_remains(case: Case) -> None:
    order, epoch = case.order, case.fresh
    batches = [batch_of_views(epoch, step, case.world_size) for step in range(order.num_steps)]
    seen = Counter(view for batch in batches for view in batch)
    assert set(seen) <= {(*row, view) for row in every_row(order) for view in range(order.views_per_image)}
    assert set(seen.values()) == {1}
    assert len(seen) == order.num_rows - order.rows_dropped
    assert order.rows_dropped < order.global_batch_size
    assert order.tail == "drop" or order.rows_dropped == 0
    assert [len(batch) for batch in batches] == [order.global_rows(step) for step in range(order.num_steps)]
    assert {len(batch) for batch in batches[:-1]} <= {order.global_batch_size}


@given(cases())
@LAW
def test_the_views_of_an_image_are_in_order_at_equal_distances_in_the_batch_of_one_rank(case: Case) -> None:
    order, epoch = case.order, case.fresh
    for step in range(order.num_steps):
        for rank in range(case.world_size):
            views = views_of(epoch.rows(step, rank, case.world_size))
            position = {view: at for at, view in enumerate(views)}
            for shard, row in {(shard, row) for shard, row, _ in views}:
                at = [position[shard, row, view] for view in range(order.views_per_image)]
                # A last image without a partner is alone in its unit.
                assert {*np.diff(at)} <= (
                    {1} if len(views) - at[0] == order.views_per_image else {order.images_per_unit}
                )


@given(cases())
@LAW
def test_steps_show_the_images_of_a_training_on_one_view_in_its_order(case: Case) -> None:
    """Of batches of as many images."""
    order, k = case.order, case.order.views_per_image
    single = replace(order, views_per_image=1, global_batch_size=order.global_batch_size // k)
    assert single.num_steps == order.num_steps
    epoch, expected = case.fresh, single.epoch(case.epoch, case.view)
    for step in range(order.num_steps):
        images = [(shard, row) for shard, row, view in batch_of_views(epoch, step, case.world_size) if view == 0]
        assert images == global_batch(expected, step, 1)


@given(cases(), st.data())
@LAW
def test_global_batches_are_the_same_for_any_world_size_and_from_any_step(case: Case, data: st.DataObject) -> None:
    """Resuming needs only a new order and a later step, also with a different world size."""
    first = data.draw(st.integers(0, case.order.num_steps - 1))
    undisturbed, resumed = case.fresh, case.fresh
    batches = [batch_of_views(undisturbed, step, 1) for step in range(case.order.num_steps)]
    suffix = [batch_of_views(resumed, step, case.world_size) for step in range(first, case.order.num_steps)]
    assert suffix == batches[first:]


@given(cases())
@LAW
def test_ranks_have_whole_lanes_and_the_fewest_rows_are_known_beforehand(case: Case) -> None:
    lanes = [case.order.lanes_of(rank, case.world_size) for rank in range(case.world_size)]
    assert [lane for rank_lanes in lanes for lane in rank_lanes] == list(range(case.order.num_lanes))
    assert max(map(len, lanes)) - min(map(len, lanes)) <= 1
    epoch = case.fresh
    assert case.order.smallest_batch(case.world_size) == min(
        (len(epoch.rows(step, rank, case.world_size).row_B), step)
        for step in range(case.order.num_steps)
        for rank in range(case.world_size)
    )


@given(cases())
@LAW
def test_mixup_partners_share_a_rank_and_are_those_of_the_view(case: Case) -> None:
    partners, epoch = expected_partners(case), case.fresh
    for step in range(case.order.num_steps):
        for rank in range(case.world_size):
            batch = epoch.rows(step, rank, case.world_size)
            rows = pairs_of(batch)
            assert [rows[position] for position in batch.partner_B.tolist()] == [partners[row] for row in rows]
            assert np.array_equal(batch.view_B[batch.partner_B], batch.view_B)
            assert {array.dtype for array in (batch.partner_B, batch.row_B, batch.shard_B, batch.view_B)} == {
                np.dtype(np.int32)
            }


def expected_partners(case: Case) -> dict[Row, Row]:
    """Group by group; without mixing, every row is its own partner."""
    partners = {row: row for row in every_row(case.order)}
    plan = case.order.plan
    for shard, count in enumerate(case.order.num_ok_S.tolist() if plan.mixes else []):
        for group, start in enumerate(range(0, count, plan.mix_group)):
            size = min(plan.mix_group, count - start)
            inside = mix_partners(plan, case.order.shard_ids[shard], group, case.view, size).tolist()
            partners.update({(shard, start + row): (shard, start + partner) for row, partner in enumerate(inside)})
    return partners


@pytest.mark.slow
@given(cases(), st.data())
@LAW
def test_first_steps_are_those_at_which_rows_name_a_shard_first(case: Case, data: st.DataObject) -> None:
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, case.order.num_steps)] * 2)))
    for rank in range(case.world_size):
        met: dict[int, int] = {}
        for step in range(start, stop):
            for shard in case.fresh.rows(step, rank, case.world_size).shard_B.tolist():
                met.setdefault(shard, step)
        expected = sorted((step, shard) for shard, step in met.items())
        assert case.fresh.first_steps(range(start, stop), rank, case.world_size) == expected


@pytest.mark.parametrize("kind", ["global", "pinned"])
@pytest.mark.parametrize("plan", ["crop", "function_matching"])
def test_epochs_seeds_and_steps_differ(kind: str, plan: str) -> None:
    def epoch_rows(seed: int, epoch: int) -> list[Row]:
        order = build([50] * 8, 40, order=kind, seed=seed, plan=ViewsConfig(kind=plan, count=9))
        return all_rows(order.epoch(epoch, 0))

    assert epoch_rows(0, 0) == epoch_rows(0, 0)
    assert epoch_rows(0, 0) != epoch_rows(0, 1) != epoch_rows(0, 2)
    assert epoch_rows(0, 0) != epoch_rows(1, 0)


def shards_by_lane(order: TrainingOrder, epoch: int) -> list[set[int]]:
    """With as many ranks as lanes a rank is a lane."""
    rows = order.epoch(epoch, 0)
    steps, lanes = range(order.num_steps), order.num_lanes
    return [{shard for step in steps for shard, _ in pairs_of(rows.rows(step, lane, lanes))} for lane in range(lanes)]


@pytest.mark.parametrize("plan", ["crop", "function_matching"])
def test_pinned_lanes_keep_their_shards_over_epochs(plan: str) -> None:
    order = build(
        [31, 40, 27, 36] * 5, 16, lanes=4, order="pinned", plan=ViewsConfig(kind=plan, count=9, mix_group=256)
    )
    first = shards_by_lane(order, 0)
    assert all(shards_by_lane(order, epoch) == first for epoch in range(1, 4))
    assert max(map(len, first)) <= 5 + 2


def test_global_lanes_take_other_shards_each_epoch() -> None:
    order = build([30] * 20, 16, lanes=4)
    assert shards_by_lane(order, 0) != shards_by_lane(order, 1)


def test_a_lane_mixes_a_few_shards_at_a_time() -> None:
    """32 shards of 100 rows in each of 2 lanes; a window is 4 shards, or 40 steps of 10 rows."""
    rows = build([100] * 64, 20, lanes=2).epoch(0, 0)
    for start in range(0, 320, 40):
        steps = [set(rows.rows(step, 0, 2).shard_B.tolist()) for step in range(start, start + 40)]
        assert len(set.union(*steps)) == 4
        assert np.mean([len(shards) for shards in steps]) > 3


@pytest.mark.slow
def test_a_rank_builds_only_its_lanes() -> None:
    """Peak memory of one of 32 ranks is a fraction of that of a single rank, which has all lanes."""
    order = build([200] * 640, 64, lanes=32)

    def peak_bytes(world_size: int) -> int:
        tracemalloc.start()
        order.epoch(0, 0).rows(0, world_size // 2, world_size)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak_bytes(32) < peak_bytes(1) / 5


@pytest.mark.parametrize("kind", ["global", "pinned"])
@pytest.mark.parametrize("plan", ["crop", slow("function_matching")])
def test_drop_loses_another_set_each_epoch_and_no_row_for_good(kind: str, plan: str) -> None:
    """Also where shards are smaller than what is lost, and their order is pinned."""
    order = build([2] * 103, 40, lanes=2, order=kind, tail="drop", plan=ViewsConfig(kind=plan, count=20))
    assert order.rows_dropped == 6
    lost = [every_row(order) - set(all_rows(order.epoch(epoch, epoch))) for epoch in range(20)]
    assert all(len(rows) == 6 for rows in lost)
    assert len({frozenset(rows) for rows in lost}) == 20
    assert not set.intersection(*lost)


@given(st.integers(1, 400), st.booleans())
def test_default_lanes_are_the_largest_divisor_up_to_64(half: int, mixed: bool) -> None:
    batch, units = (2 * half, half) if mixed else (half, half)
    order = build([1000], batch, plan=ViewsConfig(kind="function_matching" if mixed else "crop"))
    assert units % order.num_lanes == 0
    assert not [count for count in range(order.num_lanes + 1, 65) if units % count == 0]


def test_odd_singles_join_into_one_unit_and_are_not_mixed() -> None:
    """Three shards of 3 rows: one pair each, two singles in one unit, the third at the end of the epoch."""
    order = build([3, 3, 3], 2, lanes=1, plan=ViewsConfig(kind="function_matching"))
    rows = order.epoch(0, 0)
    steps = [rows.rows(step, 0, 1) for step in range(order.num_steps)]
    assert [len(step.row_B) for step in steps] == [2, 2, 2, 2, 1]
    assert sorted(step.partner_B.tolist() for step in steps) == [[0], [0, 1], [1, 0], [1, 0], [1, 0]]


def test_the_order_of_a_version_never_changes() -> None:
    """A run that resumes with a later version must train on the remaining rows."""
    order = build([3, 4, 5], 4, lanes=2, seed=5, plan=ViewsConfig(kind="function_matching"))
    assert [pairs_of(order.epoch(2, 1).rows(step, 0, 1)) for step in range(3)] == FROZEN_ORDER


def test_an_epoch_shows_the_next_k_views() -> None:
    order = build([100], 20, views_per_image=4)
    assert [[*order.views(epoch)] for epoch in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert (order.num_images, order.num_rows, order.num_steps, order.num_lanes) == (100, 400, 20, 5)


PAIRS = ViewsConfig(kind="function_matching")
REPEATED = ViewsConfig(kind="function_matching", mix_repeat=4)


@pytest.mark.parametrize(
    ("num_ok", "batch", "changes", "code", "text"),
    [
        ([100], 48, {"lanes": 5}, "train.lanes-not-divisor", "leave train.lanes out to get 48"),
        ([100], 48, {"lanes": 16, "plan": PAIRS}, "train.lanes-not-divisor", "a divisor of 24"),
        ([100], 7, {"plan": PAIRS}, "train.odd-batch-size", "set train.global_batch_size=8"),
        ([5, 4], 16, {"tail": "drop"}, "train.too-many-dropped", "9 rows"),
        ([106], 100, {"tail": "drop"}, "train.too-many-dropped", "106 rows, batches of 100: 6 dropped"),
        ([0, 0], 4, {}, "data.no-rows", "0 ok rows"),
        ([100], 10, {"views_per_image": 4}, "train.partial-images", "set train.global_batch_size=12"),
        ([100], 12, {"views_per_image": 4, "plan": REPEATED}, "train.partial-images", "set train.global_batch_size=16"),
        ([100], 48, {"views_per_image": 4, "lanes": 48}, "train.lanes-not-divisor", "a divisor of 12"),
        ([100], 48, {"views_per_image": 4, "lanes": 12, "plan": REPEATED}, "train.lanes-not-divisor", "a divisor of 6"),
        ([100], 16, {"views_per_image": 2, "plan": PAIRS}, "train.partners-differ", "views.mix_repeat=2"),
        ([100], 24, {"views_per_image": 3, "plan": REPEATED}, "train.partners-differ", "mix_repeat 4"),
        ([100], 16, {"views_per_image": 4, "num_views": 3}, "train.too-few-views", "1 to 3"),
        (
            [100],
            16,
            {"views_per_image": 4, "plan": REPEATED, "num_views": 10},
            "train.views-not-multiple",
            "num_views=8",
        ),
    ],
)
def test_numbers_that_do_not_fit_are_refused_with_the_remedy(
    num_ok: list[int], batch: int, changes: dict[str, Any], code: str, text: str
) -> None:
    with raises(code) as caught:
        build(num_ok, batch, **changes)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("views_per_image", "num_views", "plan"),
    [(1, 3, PAIRS), (4, None, REPEATED), (2, 6, REPEATED), (4, 4, REPEATED), (3, 4, ViewsConfig(kind="crop"))],
)
def test_views_that_have_the_same_partners_or_none_fit(
    views_per_image: int, num_views: int | None, plan: ViewsConfig
) -> None:
    order = build([100], 24, views_per_image=views_per_image, num_views=num_views, plan=plan)
    shown = [[view % (num_views or 99) for view in order.views(epoch)] for epoch in range(12)]
    assert all(len({*views}) == views_per_image for views in shown)
    assert not plan.mixes or all(len({view // plan.mix_repeat for view in views}) == 1 for views in shown)


def test_up_to_five_percent_of_the_rows_may_be_dropped() -> None:
    assert build([105], 100, tail="drop").rows_dropped == 5


def test_more_ranks_than_lanes_are_refused() -> None:
    with raises("train.more-ranks-than-lanes", got="world size 6, 5 lanes"):
        build([100], 10, lanes=5).lanes_of(0, 6)


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_epoch_is_an_index_error(step: int) -> None:
    with pytest.raises(IndexError, match="10 steps"):
        build([100], 10).epoch(0, 0).rows(step, 0, 1)
