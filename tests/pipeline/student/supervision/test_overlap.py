"""Training images among the validation images are counted and named, by the bytes of the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.shards.writer import pack_shards
from pipeline.student.distributed import DistributedContext
from pipeline.student.supervision.overlap import SeenImages
from tests.pipeline.caches import digit_samples
from tests.pipeline.student.conftest import Replay
from tests.pipeline.student.runs import CE, cached_source, indexed_source, run_config, warnings_of


@pytest.fixture
def validation(tmp_path: Path) -> list[str]:
    """Two shards of 24 and 16 digits under other keys, 5 of which are training images: numbers 30 to 34."""
    renamed = ((f"held-out-{key}", members) for row, (key, members) in enumerate(digit_samples(70)) if row >= 30)
    return pack_shards(renamed, f"{tmp_path}/val-%02d.tar", shard_size=24)


@pytest.mark.parametrize(("mode", "every"), [("cache", 1), ("none", 0)], ids=["each epoch", "only at the end"])
def test_images_in_both_sets_are_warned_of_once_with_their_number_and_names(
    replays: Replay, validation: list[str], tmp_path: Path, mode: str, every: int
) -> None:
    base = replays("crop").config
    keys: dict[str, Any] = {"loss": CE, "data": {"val_shards": validation}, "train": {"eval_every_epochs": every}}
    if mode == "none":
        indexed_source(base, tmp_path / "run" / "index")
    texts = warnings_of(run_config(base, tmp_path / "run", mode=mode, **keys))
    (text,) = [text for text in texts if "in the validation shards" in text]
    assert text.startswith("5 training images are also in the validation shards")
    assert "digits-01/digit-0030, digits-01/digit-0031, digits-01/digit-0032, …" in text


def test_disjoint_sets_are_not_warned_of(replays: Replay, validation: list[str], tmp_path: Path) -> None:
    keys: dict[str, Any] = {"loss": CE, "data": {"val_shards": validation[1]}}
    texts = warnings_of(run_config(replays("crop").config, tmp_path / "run", **keys))
    assert not [text for text in texts if "in the validation shards" in text]


def test_nothing_seen_overlaps_with_nothing(replays: Replay) -> None:
    overlap = SeenImages().overlap(cached_source(replays("crop")), DistributedContext())
    assert (overlap.num_rows, overlap.sample_ids) == (0, ())
