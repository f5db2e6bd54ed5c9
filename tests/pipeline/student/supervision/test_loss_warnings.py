"""Warnings about losses: each with its number, and only where it applies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.shards.writer import pack_shards
from pipeline.student.data.sources import RowSource
from pipeline.student.supervision.loss_warnings import loss_warnings
from pipeline.student.supervision.spec import resolve_spec
from schemas.config import Config
from tests.pipeline.caches import TinyCache, build, cache_section, digit_samples
from tests.pipeline.conftest import TinyConfig
from tests.pipeline.student.runs import KD, cached_source, indexed_source, run_config

DIST: dict[str, Any] = {"name": "dist"}
NO_INTRA = {**DIST, "intra_weight": 0.0}
EVEN = list(range(10)) * 4


def warnings_of(config: Config, source: RowSource, *, world_size: int = 1) -> list[str]:
    """Without the warning that the tests' teacher has random weights."""
    texts = loss_warnings(config, resolve_spec(config), source, world_size=world_size)
    return [text for text in texts if "teacher.weights is random" not in text]


@pytest.mark.parametrize(
    ("labels", "num_classes", "loss", "batch", "world_size", "parts"),
    [
        ([0, 1] * 8, 2, DIST, 8, 1, ("K = 2", "use kd")),
        # Shares and their ratio.
        ([0] * 45 + [1] * 45 + [2] * 3, 3, DIST, 90, 1, ("48.39%", "rarest 3.23%, a ratio of 15;", "compare with kd")),
        # Of ten even classes a batch of 6 lacks a given one with chance 0.9⁶ = 0.53, a batch of 7 with 0.48.
        (EVEN, 10, DIST, 6, 1, ("batches of 6 rows: 100% of the 10 classes are absent", "; raise train.global_batch")),
        (EVEN, 10, DIST, 7, 1, ()),
        # Relations are within a rank unless they are gathered.
        (EVEN, 10, DIST, 8, 2, ("batches of 4 rows", "set gather: true")),
        (EVEN, 10, {**DIST, "gather": True}, 8, 2, ()),
        # A class that never occurs is absent and no imbalance.
        ([0, 1, 2, 3] * 4, 5, DIST, 16, 1, ("20% of the 5 classes are absent",)),
        ([0] * 15 + [1], 2, KD[0], 2, 1, ()),
        ([0] * 15 + [1], 2, {**DIST, "weight": 0.0}, 2, 1, ()),
        (EVEN, 10, NO_INTRA, 2, 1, ()),
        ([None] * 8, 5, DIST, 2, 1, ()),
    ],
)
def test_dist_gives_a_warning_with_its_number_where_it_suits_the_labels_badly(
    tiny_config: TinyConfig,
    tmp_path: Path,
    labels: list[int | None],
    num_classes: int,
    loss: dict[str, Any],
    batch: int,
    world_size: int,
    parts: tuple[str, ...],
) -> None:
    samples = (
        (key, {"png": members["png"], **({} if label is None else {"cls": str(label).encode()})})
        for (key, members), label in zip(digit_samples(len(labels)), labels, strict=True)
    )
    shards = pack_shards(samples, f"{tmp_path}/labels-%02d.tar", shard_size=max(len(labels) // 2, 1))
    base = tiny_config(data={"shards": shards, "num_classes": num_classes})
    keys: dict[str, Any] = {"loss": [*KD, loss], "train": {"global_batch_size": batch}}
    config = run_config(base, tmp_path / "run", mode="online", **keys)
    texts = warnings_of(config, indexed_source(config, tmp_path / "index"), world_size=world_size)
    assert len(texts) == bool(parts)
    assert all(part in text for text in texts for part in parts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("views", "class_means"),
    [({"kind": "crop"}, "none"), ({"kind": "function_matching"}, "eval"), ({"kind": "function_matching"}, "none")],
    ids=["unmixed views", "an eval pass", "neither, so from the indexes"],
)
def test_a_cached_run_warns_like_an_online_one(
    tiny_config: TinyConfig, tmp_path: Path, views: dict[str, Any], class_means: str
) -> None:
    base = tiny_config(views=views, cache={"class_means": class_means})
    build(base)
    keys: dict[str, Any] = {"loss": [DIST], "train": {"global_batch_size": 6}}
    online = run_config(base, tmp_path / "online", mode="online", **keys)
    texts = warnings_of(online, indexed_source(online, tmp_path / "index"))
    assert len(texts) == 1
    cached = run_config(base, tmp_path / "cached", **keys)
    assert warnings_of(cached, cached_source(TinyCache(cache_section(base).url, base))) == texts
