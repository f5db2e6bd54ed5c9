"""The order of one epoch; see ``pipeline.student.data.order``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.augment.params import shard_partners
from pipeline.augment.random_bits import key_of, permutation, permutations

if TYPE_CHECKING:
    from pipeline.student.data.order import TrainingOrder

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class OrderedRows:
    """The rows of one rank in one step, in lane order.

    Attributes:
        shard_B: int32; position in the order's list of shards.
        row_B: int32; ordinal among that shard's ok rows.
        partner_B: int32; position in this batch of the mixup partner, a row's own position where it is not mixed.
        view_B: int32; position among the views that the epoch shows, 0 to k - 1.
    """

    shard_B: NDArray[np.int32]
    row_B: NDArray[np.int32]
    partner_B: NDArray[np.int32]
    view_B: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class _Units:
    """Units of the order: single images, or pairs (``W`` = 1 or 2), by their rows. An absent second image is -1."""

    shard_UW: NDArray[np.int32]
    row_UW: NDArray[np.int32]
    mixed_U: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.mixed_U)

    def __getitem__(self, units: slice | Ints) -> _Units:
        return _Units(self.shard_UW[units], self.row_UW[units], self.mixed_U[units])


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochOrder:
    """One epoch. It stores the lanes that were used, so ``rows`` is cheap at any step; about 9 bytes per row.

    Attributes:
        sequence_S: int64; the epoch's order of shards.
        ends_S: int64; units up to and including each shard of the sequence.
        joined_S: int64; by shard, the one whose single row completes this one's, or -1.
        last_single: the shard whose single row has no other to be joined with, if any.
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
        units = _concatenate([units[taken] for units in self._lanes_of(rank, world_size)])
        return _flatten(units, self.order.views_per_image)

    def first_steps(self, steps: range, rank: int, world_size: int) -> list[tuple[int, int]]:
        """(step, shard) of each shard that the rank reads in these steps, by the first step that needs it."""
        size, first_S = self.order.units_per_lane_step, np.full(len(self.order.shard_ids), steps.stop)
        for units in self._lanes_of(rank, world_size):
            shard_UW = units[steps.start * size : steps.stop * size].shard_UW
            step_U = steps.start + np.arange(len(shard_UW)) // size
            np.minimum.at(first_S, shard_UW, step_U[:, None])
        shard_M = np.flatnonzero(first_S < steps.stop)
        return sorted(zip(first_S[shard_M].tolist(), shard_M.tolist(), strict=True))

    def _lanes_of(self, rank: int, world_size: int) -> list[_Units]:
        lanes = self.order.lanes_of(rank, world_size)
        self._build([lane for lane in lanes if lane not in self._lanes])
        return [self._lanes[lane] for lane in lanes]

    def _build(self, lanes: Sequence[int]) -> None:
        """All at once: lanes are many and short, so most of the time goes into calls."""
        bounds, num_units = [self.order.lane_bounds(lane) for lane in lanes], int(self.ends_S[-1])
        shuffled = self._shuffle(lanes, [self._slice(start, min(stop, num_units)) for start, stop in bounds])
        for lane, (_, stop), units in zip(lanes, bounds, shuffled, strict=True):
            # Excluded from the shuffle: anywhere but at the end, one row would shift the pairs behind it.
            self._lanes[lane] = _concatenate([units, self._last_unit()]) if stop > num_units else units

    def _slice(self, start: int, stop: int) -> _Units:
        """Units ``start`` to ``stop`` of the epoch's sequence."""
        chunks = [_no_units(self.order.images_per_unit)]
        position = int(np.searchsorted(self.ends_S, start, side="right"))
        while start < stop:
            units, end = self._shard_units(int(self.sequence_S[position])), int(self.ends_S[position])
            begin = end - len(units)
            chunks.append(units[start - begin : stop - begin])
            start, position = end, position + 1
        return _concatenate(chunks)

    def _shard_units(self, shard: int) -> _Units:
        """All units of one shard, permuted. The last shard is stored, since neighbouring lanes may share it."""
        if shard not in self._last_shard:
            self._last_shard.clear()
            self._last_shard[shard] = self._permuted_units(shard)
        return self._last_shard[shard]

    def _permuted_units(self, shard: int) -> _Units:
        order = self.order
        units = self._paired_units(shard) if order.plan.mixes else _single_units(shard, int(order.num_ok_S[shard]))
        key = key_of("order/units", order.seed, self.epoch, order.shard_ids[shard])
        return units[permutation(key, len(units))]

    def _paired_units(self, shard: int) -> _Units:
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
        """The shard's pairs, int32 [P, 2], and its rows without a partner: one for each odd mix group."""
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
        seed, edges_by_lane = self.order.seed, [self._edges(len(lane_units)) for lane_units in units]
        keys = [
            key_of("order/window", seed, self.epoch, lane, window)
            for lane, edges in zip(lanes, edges_by_lane, strict=True)
            for window in range(len(edges) - 1)
        ]
        sizes = [size for edges in edges_by_lane for size in np.diff(edges).tolist()]
        permuted = permutations(np.array(keys, dtype=np.uint64).reshape(-1, 2), sizes)
        return [
            lane_units[np.concatenate([edge + next(permuted) for edge in edges[:-1]])]
            for lane_units, edges in zip(units, edges_by_lane, strict=True)
        ]

    def _edges(self, num_units: int) -> list[int]:
        """The starts of the windows of a lane of so many units, and the end of the last window."""
        num_windows = max(1, num_units // self.order.window_units)
        return (np.arange(num_windows + 1) * num_units // num_windows).tolist()


def _single_units(shard: int, num_rows: int) -> _Units:
    row_U1 = np.arange(num_rows, dtype=np.int32)[:, None]
    return _Units(np.full((num_rows, 1), shard, dtype=np.int32), row_U1, np.zeros(num_rows, dtype=np.bool_))


def _no_units(images_per_unit: int) -> _Units:
    nothing = np.empty((0, images_per_unit), dtype=np.int32)
    return _Units(nothing, nothing, np.empty(0, dtype=np.bool_))


def _concatenate(chunks: Sequence[_Units]) -> _Units:
    return _Units(
        np.concatenate([chunk.shard_UW for chunk in chunks]),
        np.concatenate([chunk.row_UW for chunk in chunks]),
        np.concatenate([chunk.mixed_U for chunk in chunks]),
    )


def _flatten(units: _Units, views_per_image: int) -> OrderedRows:
    """The rows of each unit, view by view."""
    row_UkW, shard_UkW = (values[:, None].repeat(views_per_image, 1) for values in (units.row_UW, units.shard_UW))
    view_UkW = np.broadcast_to(np.arange(views_per_image, dtype=np.int32)[:, None], row_UkW.shape)
    mixed_UkW = np.broadcast_to(units.mixed_U[:, None, None], row_UkW.shape)
    present_UkW = row_UkW >= 0
    position_B = np.arange(np.count_nonzero(present_UkW), dtype=np.int32)
    # Partners are at positions 2j and 2j + 1: only the very last unit can lack its second image.
    partner_B = np.where(mixed_UkW[present_UkW], position_B ^ 1, position_B)
    return OrderedRows(shard_UkW[present_UkW], row_UkW[present_UkW], partner_B, view_UkW[present_UkW])
