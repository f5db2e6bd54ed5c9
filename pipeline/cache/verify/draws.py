"""What the plan draws for every row of a shard, in the words of a part's columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.augment.params import (
    EVAL_VIEW,
    eval_params,
    is_canary,
    sample_keys,
    shard_partners,
    unmix,
    view_params,
)
from pipeline.augment.random_bits import RandomBits
from pipeline.shards.index import ShardIndex
from schemas.config import ViewsConfig

Columns = dict[str, NDArray[Any]]
"""Column name to [N], over the ok rows of a shard in tar order."""


@dataclass(frozen=True, slots=True)
class ShardAugParams:
    """The ok rows of one shard under a plan."""

    plan: ViewsConfig
    index: ShardIndex
    keys_N2: RandomBits

    @classmethod
    def of(cls, plan: ViewsConfig, index: ShardIndex) -> ShardAugParams:
        return cls(plan, index, sample_keys(plan.seed, index.sample_ids(index.ok)))

    def columns(self, view: int) -> Columns:
        """Every drawn column of a view."""
        ok = self.index.ok
        widths_N, heights_N = (side[ok].astype(np.int64) for side in (self.index.width, self.index.height))
        if view == EVAL_VIEW:
            params = eval_params(self.plan, widths_N, heights_N)
        else:
            params = view_params(self.plan, self.keys_N2, np.full(len(ok), view, np.int64), widths_N, heights_N)
        partner_N = self._partners(view)
        params = unmix(params, partner_N == np.arange(len(ok)))
        return {
            **{f"box_{side}": params.box_N4[:, at] for at, side in enumerate(("left", "top", "width", "height"))},
            "flip": params.flip_N,
            "mix_row": self.index.row[ok[partner_N]],
            "mix_lambda": params.mix_lambda_N,
            **params.aug_params,
        }

    def _partners(self, view: int) -> NDArray[np.int32]:
        """Ordinals among the ok rows."""
        if not self.plan.mixes or view == EVAL_VIEW:
            return np.arange(self.index.num_ok, dtype=np.int32)
        return shard_partners(self.plan, self.index.shard_id, view, self.index.num_ok)

    def canaries(self, view: int) -> NDArray[np.bool_]:
        """Which rows carry a proof of their pixels: [N]."""
        chosen_N = is_canary(self.keys_N2, np.full(len(self.keys_N2), view, np.int64))
        chosen_N[:1] = True
        return chosen_N
