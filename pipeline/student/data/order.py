"""Who is seen when: the rows of every (epoch, step, rank), from (seed, epoch) and the index's counts alone.

Epoch order is built in four moves. Units (rows; pairs of mates under mixing) are permuted inside each shard; shards
are laid one after another in the epoch's order; that sequence is cut into C contiguous lanes; each lane is shuffled
inside windows of a few shards. A step takes the same number of units from every lane, and a rank owns whole lanes, so
the global batches are the same for any world size, and a rank touches few shards at a time.

Every permutation is the argsort of raw Philox words, keyed by what it may depend on and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.augment.params import shard_partners
from pipeline.augment.random_bits import key_of, permutation, permutations
from pipeline.core.errors import ConfigError
from schemas.config import TrainConfig, ViewsConfig

OrderKind = Literal["global", "pinned"]
Tail = Literal["drop", "short"]

_MAX_DEFAULT_LANES = 64
_MAX_DROPPED_SHARE = 0.05
_WINDOW_SHARDS = 4
_WINDOW_STEPS = 2

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class OrderedRows:
    """The rows of one rank in one step, in lane order.

    Attributes:
        shard_B: int32; position in the order's list of shards.
        row_B: int32; ordinal among that shard's ok rows.
        partner_B: int32; position in this batch of the mixup partner, a row's own position where it is not mixed.
    """

    shard_B: NDArray[np.int32]
    row_B: NDArray[np.int32]
    partner_B: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class _Units:
    """What is moved as one: a row, or two (``W`` = 1 or 2). An absent second row is -1."""

    shard_UW: NDArray[np.int32]
    row_UW: NDArray[np.int32]
    mixed_U: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.mixed_U)

    def __getitem__(self, which: slice | Ints) -> _Units:
        return _Units(self.shard_UW[which], self.row_UW[which], self.mixed_U[which])


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOrder:
    """The order of a whole training. Build it with ``TrainingOrder.build``, which checks the numbers.

    Under mixing, mates stand side by side in one batch. A row that its shard's matching left alone is joined with the
    next such row into one unit, so that full steps have G rows; the two are not mixed with each other. Where the
    number of rows is odd, the very last such row ends the short last step, or is dropped.

    Attributes:
        num_ok_S: int64; ok rows of each shard.
        num_lanes: C.
        plan: decides whether rows are mixed, and with whom.
    """

    shard_ids: tuple[str, ...]
    num_ok_S: Ints
    seed: int
    global_batch_size: int
    num_lanes: int
    kind: OrderKind
    tail: Tail
    plan: ViewsConfig

    @classmethod
    def build(
        cls,
        shard_ids: Sequence[str],
        num_ok: Sequence[int],
        *,
        seed: int,
        global_batch_size: int,
        lanes: int | None,
        kind: OrderKind,
        tail: Tail,
        plan: ViewsConfig,
    ) -> TrainingOrder:
        """An order whose every full step has ``global_batch_size`` rows.

        Args:
            lanes: C; ``None`` takes the largest divisor of G (under mixing of G/2) up to 64.

        Raises:
            ConfigError: G is odd under mixing, C does not divide it, there are too few rows, or ``tail: drop`` would
                lose more than 5 % of them.
        """
        assert len(shard_ids) == len(num_ok), "one count for each shard"
        order = cls(
            shard_ids=tuple(shard_ids),
            num_ok_S=np.asarray(num_ok, dtype=np.int64),
            seed=seed,
            global_batch_size=global_batch_size,
            num_lanes=_checked_lanes(global_batch_size, lanes, rows_per_unit=2 if plan.mixes else 1),
            kind=kind,
            tail=tail,
            plan=plan,
        )
        _check_rows(order)
        return order

    @property
    def num_rows(self) -> int:
        return int(self.num_ok_S.sum())

    @property
    def num_steps(self) -> int:
        """Optimiser steps of one epoch."""
        if self.tail == "drop":
            return self.num_rows // self.global_batch_size
        return -(-self.num_rows // self.global_batch_size)

    @property
    def rows_dropped(self) -> int:
        """Rows that an epoch does not see."""
        return self.num_rows - self.num_steps * self.global_batch_size if self.tail == "drop" else 0

    def global_rows(self, step: int) -> int:
        """Rows of that step over all ranks: G, but for a short last step."""
        return min(self.global_batch_size, self.num_rows - step * self.global_batch_size)

    def lanes_of(self, rank: int, world_size: int) -> range:
        """The lanes of a rank: ⌊C/W⌋ or ⌈C/W⌉ neighbours.

        Raises:
            ConfigError: more ranks than lanes.
        """
        assert 0 <= rank < world_size, "ranks count from 0"
        if world_size > self.num_lanes:
            raise ConfigError(
                "there are more ranks than lanes, so some would never see a row",
                where="train.lanes",
                got=f"world size {world_size}, {self.num_lanes} lanes",
                expected="world size <= lanes",
                next_step="lower ray.num_workers, or give train.global_batch_size a larger divisor for train.lanes",
            )
        return range(rank * self.num_lanes // world_size, (rank + 1) * self.num_lanes // world_size)

    def smallest_batch(self, world_size: int) -> tuple[int, int]:
        """The fewest rows that a rank gets in a step, and that step; all full steps are alike.

        Raises:
            ConfigError: more ranks than lanes.
        """
        return min(
            (self._rows_of(step, rank, world_size), step)
            for step in {0, self.num_steps - 1}
            for rank in range(world_size)
        )

    def _rows_of(self, step: int, rank: int, world_size: int) -> int:
        bounds = [self.lane_bounds(lane) for lane in self.lanes_of(rank, world_size)]
        size = self.units_per_lane_step
        rows = sum(min(max(stop - start - step * size, 0), size) for start, stop in bounds) * self.rows_per_unit
        ends_the_epoch = self.tail == "short" and (step, rank) == (self.num_steps - 1, world_size - 1)
        return rows - self.num_rows % self.rows_per_unit if ends_the_epoch else rows

    def epoch(self, epoch: int, view: int) -> EpochOrder:
        """The order of one epoch, whose mates are those of ``view``. Lanes are built when first asked for."""
        keyed_by = (epoch,) if self.kind == "global" else ()
        sequence_S = permutation(key_of("order/shards", self.seed, *keyed_by), len(self.shard_ids))
        odd = sequence_S[self.num_ok_S[sequence_S] % self.rows_per_unit == 1]
        joined_S = np.full(len(self.shard_ids), -1, dtype=np.int64)
        joined_S[odd[: len(odd) // 2 * 2 : 2]] = odd[1::2]
        units_S = self.num_ok_S // self.rows_per_unit + (joined_S >= 0)
        return EpochOrder(
            order=self,
            epoch=epoch,
            view=view,
            sequence_S=sequence_S,
            ends_S=units_S[sequence_S].cumsum(),
            joined_S=joined_S,
            last_single=int(odd[-1]) if len(odd) % 2 else None,
        )

    @property
    def rows_per_unit(self) -> int:
        return 2 if self.plan.mixes else 1

    @property
    def units_per_lane_step(self) -> int:
        """Units that a full step takes from each lane."""
        return self.global_batch_size // self.rows_per_unit // self.num_lanes

    @property
    def window_units(self) -> int:
        """About how many units of a lane are shuffled together: a few shards, two steps at the least."""
        per_shard = -(-self.num_rows // self.rows_per_unit // len(self.shard_ids))
        shards = min(_WINDOW_SHARDS * per_shard, -(-self.num_rows // self.rows_per_unit // self.num_lanes))
        return max(shards, _WINDOW_STEPS * self.units_per_lane_step)

    @property
    def window_steps(self) -> int:
        """Steps in which a lane gets through a window."""
        return -(-self.window_units // self.units_per_lane_step)

    def shards_at_once(self, rank: int, world_size: int) -> int:
        """About how many shards a rank takes rows from within a window; a lane begins and ends inside of one."""
        shards = len(self.shard_ids) * self.window_units // max(1, self.num_rows // self.rows_per_unit) + 1
        return min(len(self.lanes_of(rank, world_size)) * shards, len(self.shard_ids))

    def lane_bounds(self, lane: int) -> tuple[int, int]:
        """First and last + 1 of a lane's places in the epoch's sequence of units.

        Lanes differ by one unit at most and the last is never the shorter, so a last single row, which stands at the
        end of it, falls into the last step.
        """
        places = self.num_rows // self.rows_per_unit
        if self.tail == "short":
            places = -(-self.num_rows // self.rows_per_unit)
        return lane * places // self.num_lanes, (lane + 1) * places // self.num_lanes


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochOrder:
    """One epoch. Keeps the lanes it was asked for, so ``rows`` is cheap at any step; about 9 bytes a row.

    Attributes:
        sequence_S: int64; the epoch's order of shards.
        ends_S: int64; units up to and with each shard of the sequence.
        joined_S: int64; by shard, the one whose single row completes this one's, or -1.
        last_single: the shard whose single row found nobody, if any.
    """

    order: TrainingOrder
    epoch: int
    view: int
    sequence_S: Ints
    ends_S: Ints
    joined_S: Ints
    last_single: int | None
    _lanes: dict[int, _Units] = field(default_factory=dict[int, _Units], repr=False, compare=False)
    _last_shard: dict[int, _Units] = field(default_factory=dict[int, _Units], repr=False, compare=False)

    def rows(self, step: int, rank: int, world_size: int) -> OrderedRows:
        """The rank's part of the step's global batch; ranks in order make the batch. Any step, in any sequence.

        Raises:
            IndexError: no such step.
            ConfigError: more ranks than lanes.
        """
        if not 0 <= step < self.order.num_steps:
            raise IndexError(f"step {step} of an epoch of {self.order.num_steps} steps")
        size = self.order.units_per_lane_step
        taken = slice(step * size, (step + 1) * size)
        return _flatten(_concatenate([units[taken] for units in self._lanes_of(rank, world_size)]))

    def first_steps(self, steps: range, rank: int, world_size: int) -> list[tuple[int, int]]:
        """(step, shard) of each shard that the rank meets in these steps, by the step at which it meets it first."""
        size, first_S = self.order.units_per_lane_step, np.full(len(self.order.shard_ids), steps.stop)
        for units in self._lanes_of(rank, world_size):
            met_UW = units[steps.start * size : steps.stop * size].shard_UW
            step_U = steps.start + np.arange(len(met_UW)) // size
            np.minimum.at(first_S, met_UW, step_U[:, None])
        found = np.flatnonzero(first_S < steps.stop)
        return sorted(zip(first_S[found].tolist(), found.tolist(), strict=True))

    def _lanes_of(self, rank: int, world_size: int) -> list[_Units]:
        lanes = self.order.lanes_of(rank, world_size)
        self._build([lane for lane in lanes if lane not in self._lanes])
        return [self._lanes[lane] for lane in lanes]

    def _build(self, lanes: Sequence[int]) -> None:
        """All at once: they are many and short, so most of the time goes into calls."""
        bounds, num_units = [self.order.lane_bounds(lane) for lane in lanes], int(self.ends_S[-1])
        shuffled = self._shuffle(lanes, [self._cut(start, min(stop, num_units)) for start, stop in bounds])
        for lane, (_, stop), units in zip(lanes, bounds, shuffled, strict=True):
            # Left out of the shuffle: anywhere but at the end, one row would shift the pairs behind it.
            self._lanes[lane] = _concatenate([units, self._last_unit()]) if stop > num_units else units

    def _cut(self, start: int, stop: int) -> _Units:
        """Units ``start`` to ``stop`` of the epoch's sequence."""
        pieces = [_no_units(self.order.rows_per_unit)]
        place = int(np.searchsorted(self.ends_S, start, side="right"))
        while start < stop:
            units, end = self._shard_units(int(self.sequence_S[place])), int(self.ends_S[place])
            begin = end - len(units)
            pieces.append(units[start - begin : stop - begin])
            start, place = end, place + 1
        return _concatenate(pieces)

    def _shard_units(self, shard: int) -> _Units:
        """All units of one shard, permuted. The last one is kept: where lanes are many, neighbours share shards."""
        if shard not in self._last_shard:
            self._last_shard.clear()
            self._last_shard[shard] = self._permuted_units(shard)
        return self._last_shard[shard]

    def _permuted_units(self, shard: int) -> _Units:
        order = self.order
        units = self._mated_units(shard) if order.plan.mixes else _single_units(shard, int(order.num_ok_S[shard]))
        key = key_of("order/units", order.seed, self.epoch, order.shard_ids[shard])
        return units[permutation(key, len(units))]

    def _mated_units(self, shard: int) -> _Units:
        pairs_P2, alone = self._mixup_partners(shard)
        joined_J2 = alone[: len(alone) // 2 * 2].reshape(-1, 2)
        row_U2 = np.concatenate([pairs_P2, joined_J2])
        shard_U2 = np.full(row_U2.shape, shard, dtype=np.int32)
        other = int(self.joined_S[shard])
        if other >= 0:
            row_U2 = np.append(row_U2, [[alone[-1], self._mixup_partners(other)[1][-1]]], axis=0)
            shard_U2 = np.append(shard_U2, [[shard, other]], axis=0)
        mixed_U = np.arange(len(row_U2)) < len(pairs_P2)
        return _Units(shard_U2.astype(np.int32), row_U2.astype(np.int32), mixed_U)

    def _mixup_partners(self, shard: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The shard's mates, int32 [P, 2], and the rows without one: an odd mix group leaves one a group."""
        order = self.order
        partner_N = shard_partners(order.plan, order.shard_ids[shard], self.view, int(order.num_ok_S[shard]))
        row_N = np.arange(len(partner_N), dtype=np.int32)
        first = partner_N > row_N
        return np.stack([row_N[first], partner_N[first]], axis=1), row_N[partner_N == row_N]

    def _last_unit(self) -> _Units:
        assert self.last_single is not None, "an odd number of rows leaves one single"
        row = self._mixup_partners(self.last_single)[1][-1]
        shard_12 = np.full((1, 2), self.last_single, dtype=np.int32)
        return _Units(shard_12, np.array([[row, -1]], dtype=np.int32), np.zeros(1, dtype=np.bool_))

    def _shuffle(self, lanes: Sequence[int], units: Sequence[_Units]) -> list[_Units]:
        """Permutes each lane's units inside windows of equal size."""
        seed, edges = self.order.seed, [self._edges(len(of_lane)) for of_lane in units]
        keys = [
            key_of("order/window", seed, self.epoch, lane, window)
            for lane, of_lane in zip(lanes, edges, strict=True)
            for window in range(len(of_lane) - 1)
        ]
        sizes = [size for of_lane in edges for size in np.diff(of_lane).tolist()]
        permuted = permutations(np.array(keys, dtype=np.uint64).reshape(-1, 2), sizes)
        return [
            of_lane[np.concatenate([edge + next(permuted) for edge in within[:-1]])]
            for of_lane, within in zip(units, edges, strict=True)
        ]

    def _edges(self, num_units: int) -> list[int]:
        """Where the windows of a lane of so many units begin, and where the last ends.

        A window spans a few shards, and two steps at the least: what a dropped tail loses is then another random part
        of the last window each epoch, also where shards are tiny and their order is pinned.
        """
        per_shard = -(-int(self.ends_S[-1]) // len(self.order.shard_ids))
        size = max(_WINDOW_SHARDS * per_shard, _WINDOW_STEPS * self.order.units_per_lane_step)
        num_windows = max(1, num_units // size)
        return (np.arange(num_windows + 1) * num_units // num_windows).tolist()


def order_of(train: TrainConfig, shard_ids: Sequence[str], num_ok: Sequence[int], plan: ViewsConfig) -> TrainingOrder:
    """The order that a config's ``train`` section asks for.

    Raises:
        ConfigError: as ``TrainingOrder.build``.
    """
    return TrainingOrder.build(
        shard_ids,
        num_ok,
        seed=train.seed,
        global_batch_size=train.global_batch_size,
        lanes=train.lanes,
        kind=train.order,
        tail=train.tail,
        plan=plan,
    )


def _checked_lanes(global_batch_size: int, lanes: int | None, *, rows_per_unit: int) -> int:
    if global_batch_size % rows_per_unit:
        raise ConfigError(
            "mixed rows come in pairs, so a global batch needs an even number of rows",
            where="train.global_batch_size",
            got=global_batch_size,
            expected="an even number",
            next_step=f"take {global_batch_size + 1}",
        )
    units = global_batch_size // rows_per_unit
    largest = max(count for count in range(1, min(_MAX_DEFAULT_LANES, units) + 1) if units % count == 0)
    if lanes is not None and units % lanes:
        raise ConfigError(
            "lanes do not divide the global batch, and each lane gives the same number of rows to a step",
            where="train.lanes",
            got=lanes,
            expected=f"a divisor of {units} (train.global_batch_size{' / 2, for mixed rows' * (rows_per_unit == 2)})",
            next_step=f"leave train.lanes out to get {largest}",
        )
    return lanes or largest


def _check_rows(order: TrainingOrder) -> None:
    if order.num_rows == 0:
        raise ConfigError(
            "there are no rows to train on", where="data", got=f"{len(order.shard_ids)} shards, 0 ok rows"
        )
    too_few, dropped = order.num_steps == 0, order.rows_dropped
    if too_few or dropped > _MAX_DROPPED_SHARE * order.num_rows:
        raise ConfigError(
            "there are fewer rows than one global batch" if too_few else "too many rows would be dropped every epoch",
            where="train.global_batch_size with train.tail: drop",
            got=f"{order.num_rows} rows, batches of {order.global_batch_size}: {dropped} dropped an epoch",
            expected=f"at most {_MAX_DROPPED_SHARE:.0%} dropped",
            next_step="set train.tail: short (every row exactly once), or a smaller train.global_batch_size",
        )


def _single_units(shard: int, num_rows: int) -> _Units:
    row_U1 = np.arange(num_rows, dtype=np.int32)[:, None]
    return _Units(np.full((num_rows, 1), shard, dtype=np.int32), row_U1, np.zeros(num_rows, dtype=np.bool_))


def _no_units(rows_per_unit: int) -> _Units:
    nothing = np.empty((0, rows_per_unit), dtype=np.int32)
    return _Units(nothing, nothing, np.empty(0, dtype=np.bool_))


def _concatenate(pieces: Sequence[_Units]) -> _Units:
    return _Units(
        np.concatenate([piece.shard_UW for piece in pieces]),
        np.concatenate([piece.row_UW for piece in pieces]),
        np.concatenate([piece.mixed_U for piece in pieces]),
    )


def _flatten(units: _Units) -> OrderedRows:
    row_B, shard_B = units.row_UW.reshape(-1), units.shard_UW.reshape(-1)
    position_B = np.arange(len(row_B), dtype=np.int32)
    # Mates stand at 2j and 2j + 1, and only the very last unit can lack its second row.
    partner_B = np.where(np.repeat(units.mixed_U, units.row_UW.shape[1]), position_B ^ 1, position_B)
    present_B = row_B >= 0
    return OrderedRows(shard_B[present_B], row_B[present_B], partner_B[present_B])
