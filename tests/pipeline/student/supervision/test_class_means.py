"""nd with an online teacher: class means from a cache of this teacher, and of no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import ConfigError
from pipeline.student.training.config_checks import check_training
from pipeline.student.training.trainer import train
from schemas.config import Config
from tests.pipeline.caches import TinyCache, build
from tests.pipeline.conftest import TinyConfig
from tests.pipeline.student.conftest import NUM_VIEWS, Replay
from tests.pipeline.student.runs import index_shards, metrics, run_config, train_until

ND = [{"name": "nd"}]


def online(base: Config, run_url: Path, means: str, **sections: Any) -> Config:
    teacher = {"class_means": means, **sections.pop("teacher", {})}
    config = run_config(base, run_url, mode="online", loss=ND, teacher=teacher, **sections)
    index_shards(config, run_url / "index")
    return config


def test_an_online_teacher_uses_the_class_means_of_its_cache(replays: Replay, tmp_path: Path) -> None:
    """The cache may have other views: its means are equal, so the losses equal those of a run from the cache."""
    base = replays("crop")
    train(online(base.config, tmp_path / "same", base.url))
    train(online(base.config, tmp_path / "other", replays("function_matching").url))
    assert metrics(tmp_path / "same") == metrics(tmp_path / "other")


def test_a_cache_without_class_means_is_refused_before_any_work(tiny_config: TinyConfig, tmp_path: Path) -> None:
    base = tiny_config(views={"count": 1}, cache={"class_means": "none"})
    build(base)
    assert base.cache is not None
    config = online(base, tmp_path / "run", base.cache.url)
    for refuse in (train, check_training):
        with pytest.raises(ConfigError) as caught:
            refuse(config)
        assert caught.value.code == "cache.no-class-means"
        assert caught.value.where == f"teacher.class_means: {base.cache.url}"


def test_class_means_of_another_number_of_classes_are_refused(replays: Replay, tmp_path: Path) -> None:
    cache = replays("crop")
    config = online(cache.config, tmp_path / "run", cache.url, data={"num_classes": 11})
    with pytest.raises(ConfigError) as caught:
        check_training(config)
    assert caught.value.got == "K = 10"


def test_an_online_run_uses_the_class_means_it_was_started_with(replay_copy: Replay, tmp_path: Path) -> None:
    cache: TinyCache = replay_copy("crop")
    config = online(cache.config, tmp_path / "run", cache.url)
    train_until(config, lambda event: event["kind"] == "step")
    pinned = (tmp_path / "run" / "manifest.json").read_bytes()
    assert pinned == (Path(cache.url) / "manifest.json").read_bytes()
    build(cache.config.model_copy(update={"views": cache.config.views.model_copy(update={"count": NUM_VIEWS + 1})}))
    assert pinned != (Path(cache.url) / "manifest.json").read_bytes()
    train(config)
    assert (tmp_path / "run" / "manifest.json").read_bytes() == pinned
