"""Losses on relations among classes are refused for heads of two classes, except in runs that began before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import ConfigError
from pipeline.shards.writer import pack_shards
from pipeline.student.run.checkpoint import claim_run
from pipeline.student.training.config_checks import check_distillation, check_training
from pipeline.student.training.trainer import train
from schemas.config import Config
from tests.errors import raises
from tests.pipeline.caches import TinyCache, digit_samples
from tests.pipeline.conftest import TinyConfig
from tests.pipeline.heads import heads_config
from tests.pipeline.student.runs import index_shards, run_config


@pytest.fixture
def two_classes(tiny_config: TinyConfig, tmp_path: Path) -> Config:
    samples = (
        (key, {"png": members["png"], "cls": str(row % 2).encode()})
        for row, (key, members) in enumerate(digit_samples(16))
    )
    shards = pack_shards(samples, f"{tmp_path}/even-%02d.tar", shard_size=16)
    return tiny_config(data={"shards": shards, "num_classes": 2})


STUDENT = {"model": "python:tests.pipeline.student.small_networks:normalised", "mean": [0.5] * 3, "std": [0.5] * 3}


def config_of(base: Config, url: Path, *loss: dict[str, Any]) -> Config:
    keys: dict[str, Any] = {"student": STUDENT, "train": {"epochs": 1, "global_batch_size": 8}}
    return run_config(base, url, mode="online", loss=[{"name": "kd"}, *loss], **keys)


@pytest.mark.parametrize("name", ["dist", "dkd"])
def test_two_classes_are_refused_before_anything_is_written(two_classes: Config, tmp_path: Path, name: str) -> None:
    config = config_of(two_classes, tmp_path / "run", {"name": name})
    index_shards(config, tmp_path / "run" / "index")
    planned = config.model_copy(update={"cache": two_classes.cache})
    for check, checked in ((train, config), (check_training, config), (check_distillation, planned)):
        with raises("loss.two-classes", ConfigError, where="loss.1", exit_code=2) as caught:
            check(checked)
        assert "kd" in str(caught.value.next_step)
    assert not (tmp_path / "run" / "config.json").exists()
    check_training(config_of(two_classes, tmp_path / "run", {"name": name, "weight": 0.0}))


@pytest.mark.parametrize("began_before", [False, True])
def test_a_term_may_allow_two_classes_and_a_run_that_began_before_resumes(
    two_classes: Config, tmp_path: Path, began_before: bool
) -> None:
    term = {"name": "dist"} if began_before else {"name": "dist", "allow_two_classes": True}
    config = config_of(two_classes, tmp_path / "run", term)
    index_shards(config, tmp_path / "run" / "index")
    if began_before:
        # All that a run of an earlier version wrote before its first checkpoint.
        claim_run(str(tmp_path / "run"), config)
    check_training(config)
    events: list[dict[str, Any]] = []
    assert train(config, report=events.append)["steps"] == 2
    assert any("dist with K = 2" in event["text"] for event in events if event["kind"] == "warning")


def test_a_head_of_two_classes_is_named(built_cache: TinyCache, tmp_path: Path) -> None:
    base = heads_config(built_cache.config, tmp_path, views={"count": 1})
    with raises("loss.two-classes", got="head even has K = 2", where="loss.2"):
        check_training(config_of(base, tmp_path / "run", {"name": "ce"}, {"name": "dist"}))
    check_training(config_of(base, tmp_path / "run", {"name": "dist", "heads": ["pair", "tags"]}))
