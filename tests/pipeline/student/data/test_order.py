"""The order of training: laws over shards, batches, world sizes and tails."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from dataclasses import dataclass
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
# Frozen: another value here is another format.
FROZEN_ORDER = [[(2, 0), (2, 4), (1, 1), (1, 2)], [(2, 1), (0, 1), (1, 0), (1, 3)], [(2, 2), (2, 3), (0, 0), (0, 2)]]


def build(num_ok: list[int], global_batch_size: int, **changes: Any) -> TrainingOrder:
    names = [f"train-{number:05d}" for number in range(len(num_ok))]
    plan = changes.pop("plan", ViewsConfig(kind="crop"))
    train = TrainConfig.model_validate({"global_batch_size": global_batch_size, "tail": "short", **changes})
    return order_of(train, names, num_ok, plan)


def pairs_of(rows: OrderedRows) -> list[Row]:
    return list(zip(rows.shard_B.tolist(), rows.row_B.tolist(), strict=True))


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
    lanes = world_size * draw(st.integers(1, 3)) + draw(st.integers(0, 2))
    batch = lanes * (2 if mixed else 1) * draw(st.integers(1, 3))
    assume(tail == "short" or sum(num_ok) % batch <= 0.05 * sum(num_ok) < sum(num_ok) - batch)
    plan = ViewsConfig(
        kind="function_matching" if mixed else "crop", count=5, mix_group=draw(st.sampled_from([2, 5, 8, 256]))
    )
    kind, seed = draw(st.sampled_from(["global", "pinned"])), draw(st.integers(0, 2**62))
    order = build(num_ok, batch, seed=seed, lanes=lanes, order=kind, tail=tail, plan=plan)
    return Case(order, draw(st.integers(0, 9)), draw(st.integers(0, 2**40)), world_size)


LAW = settings(max_examples=60, deadline=None)


@given(cases())
@LAW
def test_an_epoch_has_each_row_once_in_full_steps_and_a_last_one_of_what_remains(case: Case) -> None:
    order, epoch = case.order, case.fresh
    batches = [global_batch(epoch, step, case.world_size) for step in range(order.num_steps)]
    seen = Counter(row for batch in batches for row in batch)
    assert set(seen) <= every_row(order)
    assert set(seen.values()) == {1}
    assert len(seen) == order.num_rows - order.rows_dropped
    assert order.rows_dropped < order.global_batch_size
    assert order.tail == "drop" or order.rows_dropped == 0
    assert [len(batch) for batch in batches] == [order.global_rows(step) for step in range(order.num_steps)]
    assert {len(batch) for batch in batches[:-1]} <= {order.global_batch_size}


@given(cases(), st.data())
@LAW
def test_global_batches_are_the_same_for_any_world_size_and_from_any_step(case: Case, data: st.DataObject) -> None:
    """Resuming needs only a new order and a later step, also with a different world size."""
    first = data.draw(st.integers(0, case.order.num_steps - 1))
    undisturbed, resumed = case.fresh, case.fresh
    batches = [global_batch(undisturbed, step, 1) for step in range(case.order.num_steps)]
    suffix = [global_batch(resumed, step, case.world_size) for step in range(first, case.order.num_steps)]
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
            assert batch.partner_B.dtype == batch.row_B.dtype == batch.shard_B.dtype == np.int32


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


PAIRS = ViewsConfig(kind="function_matching")


@pytest.mark.parametrize(
    ("num_ok", "batch", "changes", "code", "text"),
    [
        ([100], 48, {"lanes": 5}, "train.lanes-not-divisor", "leave train.lanes out to get 48"),
        ([100], 48, {"lanes": 16, "plan": PAIRS}, "train.lanes-not-divisor", "a divisor of 24"),
        ([100], 7, {"plan": PAIRS}, "train.odd-batch-size", "set train.global_batch_size=8"),
        ([5, 4], 16, {"tail": "drop"}, "train.too-many-dropped", "9 rows"),
        ([106], 100, {"tail": "drop"}, "train.too-many-dropped", "106 rows, batches of 100: 6 dropped"),
        ([0, 0], 4, {}, "data.no-rows", "0 ok rows"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_with_the_remedy(
    num_ok: list[int], batch: int, changes: dict[str, Any], code: str, text: str
) -> None:
    with raises(code) as caught:
        build(num_ok, batch, **changes)
    assert text in str(caught.value)


def test_up_to_five_percent_of_the_rows_may_be_dropped() -> None:
    assert build([105], 100, tail="drop").rows_dropped == 5


def test_more_ranks_than_lanes_are_refused() -> None:
    with raises("train.more-ranks-than-lanes", got="world size 6, 5 lanes"):
        build([100], 10, lanes=5).lanes_of(0, 6)


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_epoch_is_an_index_error(step: int) -> None:
    with pytest.raises(IndexError, match="10 steps"):
        build([100], 10).epoch(0, 0).rows(step, 0, 1)
