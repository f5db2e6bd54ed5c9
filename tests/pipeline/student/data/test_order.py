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
from pipeline.core.errors import ConfigError
from pipeline.student.data.order import EpochOrder, OrderedRows, TrainingOrder
from schemas.config import ViewsConfig
from tests.marks import slow

WORLD_SIZES = (1, 2, 3, 4, 8)
Row = tuple[int, int]
# Frozen: another value here is another format.
FROZEN_ORDER = [[(2, 0), (2, 4), (1, 1), (1, 2)], [(2, 1), (0, 1), (1, 0), (1, 3)], [(2, 2), (2, 3), (0, 0), (0, 2)]]


def build(num_ok: list[int], global_batch_size: int, **changes: Any) -> TrainingOrder:
    settings_ = {"seed": 0, "lanes": None, "kind": "global", "tail": "short", "plan": ViewsConfig(kind="crop")}
    names = [f"train-{number:05d}" for number in range(len(num_ok))]
    return TrainingOrder.build(names, num_ok, global_batch_size=global_batch_size, **{**settings_, **changes})


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
    order = build(num_ok, batch, seed=seed, lanes=lanes, kind=kind, tail=tail, plan=plan)
    return Case(order, draw(st.integers(0, 9)), draw(st.integers(0, 2**40)), world_size)


LAW = settings(max_examples=60, deadline=None)


@LAW
@given(cases())
def test_the_fewest_rows_are_those_of_the_rank_and_step_with_the_fewest(case: Case) -> None:
    epoch = case.fresh
    rows = {
        (len(epoch.rows(step, rank, case.world_size).row_B), step)
        for step in range(case.order.num_steps)
        for rank in range(case.world_size)
    }
    assert case.order.smallest_batch(case.world_size) == min(rows)


@given(cases())
@LAW
def test_each_row_comes_once_an_epoch_or_is_counted_as_dropped(case: Case) -> None:
    seen = Counter(all_rows(case.fresh, case.world_size))
    assert set(seen) <= every_row(case.order)
    assert set(seen.values()) == {1}
    assert len(seen) == case.order.num_rows - case.order.rows_dropped
    if case.order.tail == "short":
        assert case.order.rows_dropped == 0
    assert case.order.rows_dropped < case.order.global_batch_size


@given(cases())
@LAW
def test_global_batches_are_the_same_for_any_world_size(case: Case) -> None:
    alone, together = case.fresh, case.fresh
    for step in range(case.order.num_steps):
        assert global_batch(together, step, case.world_size) == global_batch(alone, step, 1)


@given(cases())
@LAW
def test_full_steps_have_g_rows_and_the_last_has_what_remains(case: Case) -> None:
    rows = case.fresh
    sizes = [len(global_batch(rows, step, 1)) for step in range(case.order.num_steps)]
    assert sizes == [case.order.global_rows(step) for step in range(case.order.num_steps)]
    assert set(sizes[:-1]) <= {case.order.global_batch_size}
    assert sum(sizes) == case.order.num_rows - case.order.rows_dropped


@given(cases())
@LAW
def test_ranks_differ_by_one_lane_at_most(case: Case) -> None:
    lanes = [case.order.lanes_of(rank, case.world_size) for rank in range(case.world_size)]
    assert [lane for own in lanes for lane in own] == list(range(case.order.num_lanes))
    assert max(map(len, lanes)) - min(map(len, lanes)) <= 1


@given(cases())
@LAW
def test_mixup_partners_share_a_rank_and_are_those_of_the_view(case: Case) -> None:
    partners, epoch = expected_partners(case), case.fresh
    for step in range(case.order.num_steps):
        for rank in range(case.world_size):
            batch = epoch.rows(step, rank, case.world_size)
            rows = pairs_of(batch)
            assert [rows[place] for place in batch.partner_B.tolist()] == [partners[row] for row in rows]
            assert batch.partner_B.dtype == batch.row_B.dtype == batch.shard_B.dtype == np.int32


def expected_partners(case: Case) -> dict[Row, Row]:
    """Group by group; without mixing, every row is its own partner."""
    partners = {row: row for row in every_row(case.order)}
    plan = case.order.plan
    for shard, count in enumerate(case.order.num_ok_S.tolist() if plan.mixes else []):
        for group, start in enumerate(range(0, count, plan.mix_group)):
            size = min(plan.mix_group, count - start)
            inside = mix_partners(plan, case.order.shard_ids[shard], group, case.view, size).tolist()
            partners.update({(shard, start + place): (shard, start + mate) for place, mate in enumerate(inside)})
    return partners


@given(cases(), st.data())
@LAW
def test_any_step_can_be_read_alone(case: Case, data: st.DataObject) -> None:
    """Resuming needs only a new order and a later step, also with a different world size."""
    step = data.draw(st.integers(0, case.order.num_steps - 1))
    undisturbed, resumed = case.fresh, case.fresh
    batches = [global_batch(undisturbed, number, case.world_size) for number in range(case.order.num_steps)]
    suffix = [global_batch(resumed, number, 1) for number in range(step, case.order.num_steps)]
    assert suffix == batches[step:]


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
        order = build([50] * 8, 40, kind=kind, seed=seed, plan=ViewsConfig(kind=plan, count=9))
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
    order = build([31, 40, 27, 36] * 5, 16, lanes=4, kind="pinned", plan=ViewsConfig(kind=plan, count=9, mix_group=256))
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
    order = build([2] * 103, 40, lanes=2, kind=kind, tail="drop", plan=ViewsConfig(kind=plan, count=20))
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


def refused(**arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build(**arguments)
    return str(caught.value)


def test_lanes_that_do_not_divide_are_refused_with_a_number_that_does() -> None:
    message = refused(num_ok=[100], global_batch_size=48, lanes=5)
    assert "train.lanes" in message
    assert "a divisor of 48" in message
    assert "leave train.lanes out to get 48" in message


def test_lanes_must_divide_the_pairs_of_a_mixed_batch() -> None:
    assert "a divisor of 24" in refused(
        num_ok=[100], global_batch_size=48, lanes=16, plan=ViewsConfig(kind="function_matching")
    )


def test_an_odd_batch_of_pairs_is_refused() -> None:
    message = refused(num_ok=[100], global_batch_size=7, plan=ViewsConfig(kind="function_matching"))
    assert "train.global_batch_size" in message
    assert "set train.global_batch_size=8" in message


def test_fewer_rows_than_a_batch_are_refused_unless_the_tail_is_short() -> None:
    message = refused(num_ok=[5, 4], global_batch_size=16, tail="drop")
    assert "9 rows" in message
    assert "train.tail: short" in message
    assert len(all_rows(build([5, 4], 16, tail="short").epoch(0, 0))) == 9


def test_dropping_over_five_percent_is_refused_with_the_counts() -> None:
    message = refused(num_ok=[106], global_batch_size=100, tail="drop")
    assert "106 rows, batches of 100: 6 dropped" in message
    assert build([105], 100, tail="drop").rows_dropped == 5


def test_no_rows_are_refused() -> None:
    assert "0 ok rows" in refused(num_ok=[0, 0], global_batch_size=4)


def test_more_ranks_than_lanes_are_refused() -> None:
    order = build([100], 10, lanes=5)
    with pytest.raises(ConfigError) as caught:
        order.lanes_of(0, 6)
    assert (caught.value.code, caught.value.got) == ("train.more-ranks-than-lanes", "world size 6, 5 lanes")


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_epoch_is_an_index_error(step: int) -> None:
    with pytest.raises(IndexError, match="10 steps"):
        build([100], 10).epoch(0, 0).rows(step, 0, 1)
