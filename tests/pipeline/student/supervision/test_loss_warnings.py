"""Warnings about losses: each with its number, and only where it applies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.shards.writer import pack_shards
from pipeline.student.supervision.loss_warnings import loss_warnings
from pipeline.student.supervision.spec import resolve_spec
from pipeline.student.training.trainer import train
from schemas.config import Config
from tests.pipeline.caches import TinyCache, build, digit_samples
from tests.pipeline.conftest import TinyConfig
from tests.pipeline.student.runs import KD, cached_source, indexed_source, run_config

DIST: dict[str, Any] = {"name": "dist"}
GATHER = {**DIST, "gather": True}
ConfigOf = Callable[..., Config]


@pytest.fixture
def config_of(tiny_config: TinyConfig, tmp_path: Path) -> ConfigOf:
    """``config_of([labels], …)``: an online training by one shard whose samples have these labels."""

    def make(labels: list[int | None], *, num_classes: int, loss: list[dict[str, Any]], batch: int) -> Config:
        samples = (
            (key, {"png": members["png"], **({} if label is None else {"cls": str(label).encode()})})
            for (key, members), label in zip(digit_samples(len(labels)), labels, strict=True)
        )
        shards = pack_shards(samples, f"{tmp_path}/labels-%02d.tar", shard_size=max(len(labels) // 2, 1))
        base = tiny_config(data={"shards": shards, "num_classes": num_classes})
        return run_config(base, tmp_path / "run", mode="online", loss=loss, train={"global_batch_size": batch})

    return make


def warnings_of(config: Config, folder: Path, *, world_size: int = 1) -> list[str]:
    found = loss_warnings(config, resolve_spec(config), indexed_source(config, folder), world_size=world_size)
    return about_losses(found)


def about_losses(texts: list[str]) -> list[str]:
    """Without the warning that the tests' teacher has random weights."""
    return [text for text in texts if "teacher.weights is random" not in text]


def test_two_classes_give_a_warning_about_dist(config_of: ConfigOf, tmp_path: Path) -> None:
    (text,) = warnings_of(config_of([0, 1] * 8, num_classes=2, loss=[DIST], batch=8), tmp_path / "index")
    assert "K = 2" in text
    assert "use kd" in text


def test_strong_imbalance_gives_a_warning_with_its_ratio(config_of: ConfigOf, tmp_path: Path) -> None:
    labels = [0] * 45 + [1] * 45 + [2] * 3
    (text,) = warnings_of(config_of(labels, num_classes=3, loss=[DIST], batch=90), tmp_path / "index")
    assert "48.39% of the labels, the rarest 3.23%, a ratio of 15;" in text
    assert "compare with kd" in text


def test_classes_absent_from_most_batches_are_counted(config_of: ConfigOf, tmp_path: Path) -> None:
    """Ten even classes: a batch of 6 lacks a given one with chance 0.9⁶ = 0.53, a batch of 7 with 0.48."""
    labels = list(range(10)) * 4
    (text,) = warnings_of(config_of(labels, num_classes=10, loss=[DIST], batch=6), tmp_path / "index")
    assert "batches of 6 rows: 100% of the 10 classes are absent from most of them" in text
    assert "raise train.global_batch_size" in text
    assert "gather" not in text
    assert warnings_of(config_of(labels, num_classes=10, loss=[DIST], batch=7), tmp_path / "index") == []


def test_relations_are_within_a_rank_unless_they_are_gathered(config_of: ConfigOf, tmp_path: Path) -> None:
    labels = list(range(10)) * 4
    (text,) = warnings_of(config_of(labels, num_classes=10, loss=[DIST], batch=8), tmp_path / "index", world_size=2)
    assert "batches of 4 rows" in text
    assert "set gather: true" in text
    assert (
        warnings_of(config_of(labels, num_classes=10, loss=[GATHER], batch=8), tmp_path / "index", world_size=2) == []
    )


def test_a_class_that_never_occurs_is_absent_and_no_imbalance(config_of: ConfigOf, tmp_path: Path) -> None:
    (text,) = warnings_of(config_of([0, 1, 2, 3] * 4, num_classes=5, loss=[DIST], batch=16), tmp_path / "index")
    assert "20% of the 5 classes are absent" in text


@pytest.mark.parametrize("loss", [KD, [*KD, {**DIST, "weight": 0.0}]], ids=["no dist", "dist of weight 0"])
def test_without_dist_there_is_no_warning(config_of: ConfigOf, tmp_path: Path, loss: list[dict[str, Any]]) -> None:
    assert warnings_of(config_of([0] * 15 + [1], num_classes=2, loss=loss, batch=2), tmp_path / "index") == []


def test_without_intra_relations_absent_classes_do_not_matter(config_of: ConfigOf, tmp_path: Path) -> None:
    loss = [{**DIST, "intra_weight": 0.0}]
    assert warnings_of(config_of(list(range(10)) * 2, num_classes=10, loss=loss, batch=2), tmp_path / "index") == []


def test_without_labels_there_is_no_warning_about_classes(config_of: ConfigOf, tmp_path: Path) -> None:
    assert warnings_of(config_of([None] * 8, num_classes=5, loss=[DIST], batch=2), tmp_path / "index") == []


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
    online = warnings_of(run_config(base, tmp_path / "online", mode="online", **keys), tmp_path / "index")
    assert len(online) == 1
    cached = run_config(base, tmp_path / "cached", **keys)
    assert base.cache is not None
    source = cached_source(TinyCache(base.cache.url, base))
    assert about_losses(loss_warnings(cached, resolve_spec(cached), source, world_size=1)) == online


def test_a_run_warns_at_its_start(config_of: ConfigOf, tmp_path: Path) -> None:
    config = config_of([0, 1] * 8, num_classes=2, loss=[*KD, DIST], batch=8)
    indexed_source(config, tmp_path / "run" / "index")
    events: list[dict[str, Any]] = []
    train(config, report=events.append)
    kinds = [event["kind"] for event in events]
    assert kinds.index("warning") < kinds.index("begin")
    (text,) = about_losses([event["text"] for event in events if event["kind"] == "warning"])
    assert "K = 2" in text
