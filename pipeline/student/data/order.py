"""The sample order: the rows of every (epoch, step, rank), from (seed, epoch) and the index's counts alone.

The order of an epoch is built in four stages. Units (images; mixup pairs under mixing; with the rows of all views that
the epoch shows of them) are permuted inside each shard; shards are concatenated in the epoch's order; that sequence is
split into C contiguous lanes; each lane is shuffled inside windows of a few shards. A step takes the same number of
units from every lane, and a rank owns whole lanes, so the global batches are the same for any world size, and a rank
touches few shards at a time.

Every permutation is the argsort of raw Philox bits, keyed by what it may depend on and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.augment.random_bits import key_of, permutation
from pipeline.core.errors import ConfigError
from pipeline.student.data.epoch_order import EpochOrder, Ints
from schemas.config import TrainConfig, ViewsConfig

_MAX_DEFAULT_LANES = 64
_MAX_DROPPED_SHARE = 0.05
_WINDOW_SHARDS = 4
_WINDOW_STEPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOrder:
    """The order of a training. Build it with ``order_of``, which checks the numbers.

    The k rows of an image, one for each view that the epoch shows, are in one batch: in a row, or under mixing each
    next to its mixup partner. An image without a partner in its shard is joined with the next such image into
    one unit, so that full steps have G rows; the two are not mixed with each other. If the number of images is odd, the
    last such image ends the short last step, or is dropped.

    Attributes:
        num_ok_S: int64; ok rows of each shard.
        num_lanes: C.
        views_per_image: k.
        plan: decides whether rows are mixed, and with whom.
    """

    shard_ids: tuple[str, ...]
    num_ok_S: Ints
    seed: int
    global_batch_size: int
    num_lanes: int
    kind: Literal["global", "pinned"]
    tail: Literal["drop", "short"]
    plan: ViewsConfig
    views_per_image: int = 1

    @property
    def num_images(self) -> int:
        return int(self.num_ok_S.sum())

    @property
    def num_rows(self) -> int:
        """Views of all images in an epoch."""
        return self.num_images * self.views_per_image

    def views(self, epoch: int) -> range:
        """The views that an epoch shows of each image, counted over all epochs; see ``RowSource.view_of``."""
        return range(epoch * self.views_per_image, (epoch + 1) * self.views_per_image)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of one epoch."""
        if self.tail == "drop":
            return self.num_rows // self.global_batch_size
        return -(-self.num_rows // self.global_batch_size)

    @property
    def rows_dropped(self) -> int:
        """Rows that an epoch leaves out."""
        return self.num_rows - self.num_steps * self.global_batch_size if self.tail == "drop" else 0

    def global_rows(self, step: int) -> int:
        """Rows of that step over all ranks: G, or fewer in a short last step."""
        return min(self.global_batch_size, self.num_rows - step * self.global_batch_size)

    def lanes_of(self, rank: int, world_size: int) -> range:
        """The lanes of a rank: ⌊C/W⌋ or ⌈C/W⌉ contiguous ones.

        Raises:
            ConfigError: more ranks than lanes.
        """
        assert 0 <= rank < world_size, "ranks count from 0"
        if world_size > self.num_lanes:
            raise ConfigError(
                "there are more ranks than lanes, so some would have no rows",
                code="train.more-ranks-than-lanes",
                where="train.lanes",
                got=f"world size {world_size}, {self.num_lanes} lanes",
                expected="world size <= lanes",
                next_step="lower ray.num_workers, or give train.global_batch_size a larger divisor for train.lanes",
            )
        return range(rank * self.num_lanes // world_size, (rank + 1) * self.num_lanes // world_size)

    def smallest_batch(self, world_size: int) -> tuple[int, int]:
        """The smallest number of rows of a rank in a step, and that step; all full steps have the same sizes.

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
        """The order of one epoch. Lanes are built at their first use.

        Args:
            view: the first view that the epoch shows; all have the same mixup partners.
        """
        keyed_by = (epoch,) if self.kind == "global" else ()
        sequence_S = permutation(key_of("order/shards", self.seed, *keyed_by), len(self.shard_ids))
        odd = sequence_S[self.num_ok_S[sequence_S] % self.images_per_unit == 1]
        joined_S = np.full(len(self.shard_ids), -1, dtype=np.int64)
        joined_S[odd[: len(odd) // 2 * 2 : 2]] = odd[1::2]
        units_S = self.num_ok_S // self.images_per_unit + (joined_S >= 0)
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
    def images_per_unit(self) -> int:
        return _images_per_unit(self.plan)

    @property
    def rows_per_unit(self) -> int:
        return self.images_per_unit * self.views_per_image

    @property
    def units_per_lane_step(self) -> int:
        """Units that a full step takes from each lane."""
        return self.global_batch_size // self.rows_per_unit // self.num_lanes

    @property
    def window_units(self) -> int:
        """Units that are shuffled together: a few shards, two steps at the least.

        What a dropped tail loses is then another random part of the last window each epoch, also where shards are tiny
        and their order is pinned.
        """
        per_shard = -(-(self.num_rows // self.rows_per_unit) // len(self.shard_ids))
        return max(_WINDOW_SHARDS * per_shard, _WINDOW_STEPS * self.units_per_lane_step)

    @property
    def _lane_window_units(self) -> int:
        """``window_units``, or a whole lane if that is shorter."""
        per_lane = -(-self.num_rows // self.rows_per_unit // self.num_lanes)
        return min(self.window_units, max(per_lane, _WINDOW_STEPS * self.units_per_lane_step))

    @property
    def window_steps(self) -> int:
        """Steps that take all units of a window from a lane."""
        return -(-self._lane_window_units // self.units_per_lane_step)

    def shards_at_once(self, rank: int, world_size: int) -> int:
        """About how many shards a rank takes rows from within a window; a lane may begin and end inside of one."""
        shards = len(self.shard_ids) * self._lane_window_units // max(1, self.num_rows // self.rows_per_unit) + 1
        return min(len(self.lanes_of(rank, world_size)) * shards, len(self.shard_ids))

    def lane_bounds(self, lane: int) -> tuple[int, int]:
        """First and last + 1 of a lane's positions in the epoch's sequence of units.

        Lanes differ by one unit at most and the last is never the shorter, so a last single image, at its end, falls
        into the last step.
        """
        num_units = self.num_rows // self.rows_per_unit
        if self.tail == "short":
            num_units = -(-self.num_rows // self.rows_per_unit)
        return lane * num_units // self.num_lanes, (lane + 1) * num_units // self.num_lanes


def order_of(
    train: TrainConfig,
    shard_ids: Sequence[str],
    num_ok: Sequence[int],
    plan: ViewsConfig,
    *,
    num_views: int | None = None,
) -> TrainingOrder:
    """The order of a config's ``train`` section, whose every full step has ``train.global_batch_size`` rows.

    Without ``train.lanes``, C is the largest divisor of the units of a step up to 64.

    Args:
        num_views: V, after which views repeat; None: they do not.

    Raises:
        ConfigError: see ``check_units``; there are too few rows, or ``tail: drop`` would drop more than 5 % of them.
    """
    assert len(shard_ids) == len(num_ok), "one count for each shard"
    num_lanes = check_units(train, plan, num_views)
    order = TrainingOrder(
        shard_ids=tuple(shard_ids),
        num_ok_S=np.asarray(num_ok, dtype=np.int64),
        seed=train.seed,
        global_batch_size=train.global_batch_size,
        num_lanes=num_lanes,
        kind=train.order,
        tail=train.tail,
        plan=plan,
        views_per_image=train.views_per_image,
    )
    _check_rows(order)
    return order


def _images_per_unit(plan: ViewsConfig) -> int:
    return 2 if plan.mixes else 1


def check_units(train: TrainConfig, plan: ViewsConfig, num_views: int | None) -> int:
    """Checks that batches consist of whole units, and that the views of an epoch exist and have the same partners.

    Args:
        num_views: V, after which views repeat; None: they do not.

    Returns:
        C, the number of lanes.

    Raises:
        ConfigError: k, the number of views of an image in a batch, is more than V; under mixing it divides
            ``views.mix_repeat`` or V not; a unit's rows do not divide G; or C does not divide G's units.
    """
    if train.views_per_image > 1:
        _check_views(train.views_per_image, plan, num_views)
    rows_per_unit = _images_per_unit(plan) * train.views_per_image
    if train.global_batch_size % rows_per_unit:
        raise _partial_units(train, rows_per_unit)
    units, lanes = train.global_batch_size // rows_per_unit, train.lanes
    largest = max(count for count in range(1, min(_MAX_DEFAULT_LANES, units) + 1) if units % count == 0)
    if lanes is not None and units % lanes:
        of_unit = f" / {rows_per_unit}, the rows of {'a pair' if plan.mixes else 'an image'}" * (rows_per_unit > 1)
        raise ConfigError(
            "the number of lanes does not divide the global batch, and a step takes as many rows from each lane",
            code="train.lanes-not-divisor",
            where="train.lanes",
            got=lanes,
            expected=f"a divisor of {units} (train.global_batch_size{of_unit})",
            next_step=f"leave train.lanes out to get {largest}",
        )
    return lanes or largest


def _partial_units(train: TrainConfig, rows_per_unit: int) -> ConfigError:
    rows, views = train.global_batch_size, train.views_per_image
    if views == 1:
        return ConfigError(
            "mixed rows come in pairs, so a global batch needs an even number of rows",
            code="train.odd-batch-size",
            where="train.global_batch_size",
            got=rows,
            expected="an even number",
            next_step=f"set train.global_batch_size={rows + 1}",
        )
    return ConfigError(
        "a global batch counts rows, and does not hold all views of each of its images",
        code="train.partial-images",
        where="train.global_batch_size with train.views_per_image",
        got=f"{rows} rows, {views} views of an image",
        expected=f"a multiple of {rows_per_unit}" + (": mixed images come in pairs" if rows_per_unit > views else ""),
        next_step=f"set train.global_batch_size={-(-rows // rows_per_unit) * rows_per_unit}",
    )


def _check_views(views_per_image: int, plan: ViewsConfig, num_views: int | None) -> None:
    if num_views is not None and views_per_image > num_views:
        raise ConfigError(
            "a batch cannot hold more views of an image than there are",
            code="train.too-few-views",
            where="train.views_per_image",
            got=views_per_image,
            expected=f"1 to {num_views}" + (" (kind eval has one view)" if plan.kind == "eval" else ""),
            next_step=f"set train.views_per_image={num_views}, or build a cache of more views (views.count)",
        )
    if not plan.mixes:
        return
    if plan.mix_repeat % views_per_image:
        raise ConfigError(
            "each view mixes an image with another partner, so its views cannot share a batch with their partners'",
            code="train.partners-differ",
            where="train.views_per_image with views.mix_repeat",
            got=f"views_per_image {views_per_image}, mix_repeat {plan.mix_repeat}",
            expected="views_per_image divides mix_repeat",
            next_step=f"set train.views_per_image=1; or views.mix_repeat={views_per_image}, so that as many views in a "
            "row have the same partners (other views, so another cache.url); or views.kind=crop, which mixes nothing",
        )
    if num_views is not None and num_views % views_per_image:
        whole = num_views // views_per_image * views_per_image
        raise ConfigError(
            "after the last view the first one follows, with other partners, so both cannot be in one batch",
            code="train.views-not-multiple",
            where="train.views_per_image",
            got=f"views_per_image {views_per_image}, {num_views} views",
            expected="a divisor of the number of mixed views",
            next_step=f"set data.num_views={whole} to train on the first {whole} views of the cache, or "
            f"views.count={whole + views_per_image} to add views to it",
        )


def _check_rows(order: TrainingOrder) -> None:
    if order.num_rows == 0:
        raise ConfigError(
            "there are no rows to train on",
            code="data.no-rows",
            where="data",
            got=f"{len(order.shard_ids)} shards, 0 ok rows",
        )
    too_few, dropped = order.num_steps == 0, order.rows_dropped
    if too_few or dropped > _MAX_DROPPED_SHARE * order.num_rows:
        raise ConfigError(
            "there are fewer rows than one global batch" if too_few else "too many rows would be dropped every epoch",
            code="train.too-many-dropped",
            where="train.global_batch_size with train.tail: drop",
            got=f"{order.num_rows} rows, batches of {order.global_batch_size}: {dropped} dropped an epoch",
            expected=f"at most {_MAX_DROPPED_SHARE:.0%} dropped",
            next_step="set train.tail: short (every row exactly once), or a smaller train.global_batch_size",
        )
