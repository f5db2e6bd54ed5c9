"""Every rank has the rows in each step that its student needs, or no rank begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.student.distributed import DistributedContext
from pipeline.student.training.setup import prepare
from tests.errors import raises
from tests.pipeline.student.conftest import Replay
from tests.pipeline.student.runs import ALL_TERMS, NORMALISED, run_config

PLAIN: dict[str, Any] = {}
BATCHNORM: dict[str, Any] = {"student": NORMALISED}
PROJECTOR: dict[str, Any] = {"loss": ALL_TERMS}
MAY_GROW: dict[str, Any] = {**BATCHNORM, "ray": {"num_workers": 2, "min_workers": 1}}


@pytest.mark.parametrize(
    ("sections", "batch", "accumulate", "world_size", "got"),
    [
        (BATCHNORM, 34, 1, 1, "1 of its 1 rows, over 1 ranks"),
        (PROJECTOR, 34, 1, 1, "1 of its 1 rows, over 1 ranks"),
        (PLAIN, 34, 1, 1, None),
        (BATCHNORM, 8, 1, 2, "1 of its 3 rows, over 2 ranks"),
        (MAY_GROW, 8, 1, 1, "1 of its 3 rows, over 2 ranks"),
        (PLAIN, 34, 1, 2, "0 of its 1 rows, over 2 ranks"),
        (BATCHNORM, 5, 1, 5, "1 of its 5 rows, over 5 ranks"),
        (BATCHNORM, 7, 7, 1, "7 of its 7 rows, over 1 ranks, split into 7"),
        (BATCHNORM, 7, 4, 1, "7 of its 7 rows, over 1 ranks, split into 4"),
        (BATCHNORM, 7, 3, 1, None),
        (PLAIN, 7, 7, 1, None),
        (PLAIN, 7, 8, 1, "7 of its 7 rows, over 1 ranks, split into 8"),
    ],
)
def test_a_step_has_enough_rows_for_each_rank(
    replays: Replay,
    tmp_path: Path,
    sections: dict[str, Any],
    batch: int,
    accumulate: int,
    world_size: int,
    got: str | None,
) -> None:
    """The last step of an epoch has the remainder of 35 rows. Each rank checks all ranks, so that none waits."""
    keys = {"global_batch_size": batch, "accumulate": accumulate}
    config = run_config(replays("crop").config, tmp_path, **sections, train=keys)
    for rank in range(world_size):
        distributed = DistributedContext(rank, world_size)
        if got is None:
            prepare(config, distributed).close()
            continue
        with raises("train.batch-too-small", got=got) as caught:
            prepare(config, distributed)
        assert str(caught.value.where).endswith("of every epoch")
        next_step = str(caught.value.next_step)
        assert ("train.accumulate" in next_step) == (accumulate > 1)
        assert ("train.tail: drop" in next_step) == (35 % batch > 0)
