"""Errors in a config are detected before any work, and leave no files behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import ConfigError, InputError
from pipeline.student.training.config_checks import check_config, check_distillation, check_training
from schemas.config import Config
from tests.pipeline.student.conftest import Replay
from tests.pipeline.student.runs import run_config

ND = [{"name": "nd"}]
KD = [{"name": "kd"}]
REVIEW: dict[str, Any] = {"name": "review_kd", "student_layers": ["conv2"], "teacher_layers": ["layer3"]}


@pytest.mark.parametrize(
    ("sections", "code"),
    [
        ({"loss": ND, "teacher": {"mode": "online"}}, "config.no-class-means"),
        ({"loss": ND, "teacher": {"mode": "none"}}, "config.loss-needs-teacher"),
        ({"loss": [{"name": "mse"}], "teacher": {"mode": "none"}}, "config.loss-needs-teacher"),
        ({"loss": KD, "teacher": {"mode": "none"}}, "config.loss-needs-teacher"),
        ({"loss": KD, "teacher": {"mode": "cache", "class_means": "x"}}, "config.online-keys-unused"),
        ({"loss": KD, "teacher": {"mode": "online", "model": None}}, "config.missing-key"),
        ({"loss": [REVIEW], "teacher": {"mode": "cache"}}, "config.review-needs-online"),
        ({"loss": [REVIEW], "teacher": {"mode": "none"}}, "config.review-needs-online"),
        ({"loss": [REVIEW, REVIEW], "teacher": {"mode": "online"}}, "config.review-repeated"),
    ],
)
def test_a_loss_that_this_teacher_mode_cannot_serve_is_refused_by_the_config_alone(
    sections: dict[str, Any], code: str, replays: Replay, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(run_config(replays("crop").config, tmp_path, **sections))
    assert caught.value.code == code


def test_a_loss_of_another_task_is_refused_by_the_config_alone(replays: Replay, tmp_path: Path) -> None:
    config = run_config(replays("crop").config, tmp_path, loss=[{"name": "ce"}, *KD])
    data = config.data.model_copy(update={"task": "parity"})
    with pytest.raises(ConfigError) as caught:
        check_config(config.model_copy(update={"data": data}))
    assert (caught.value.code, caught.value.where) == ("loss.other-task", "loss.0.name")


def test_dist_over_all_ranks_and_micro_batches_do_not_go_together(replays: Replay, tmp_path: Path) -> None:
    gathered = [{"name": "dist", "gather": True}]
    base = replays("crop").config
    check_config(run_config(base, tmp_path, loss=gathered))
    with pytest.raises(ConfigError) as caught:
        check_config(run_config(base, tmp_path, loss=gathered, train={"accumulate": 2}))
    assert caught.value.code == "config.gather-accumulate"


def test_a_run_in_the_folder_of_its_cache_is_refused(replays: Replay) -> None:
    cache = replays("crop")
    with pytest.raises(ConfigError) as caught:
        check_config(run_config(cache.config, Path(cache.url), loss=KD))
    assert caught.value.code == "config.run-in-cache"


@pytest.mark.parametrize(
    "sections",
    [
        {"student": {"model": "timm/nonsense", "kwargs": {}}},
        {"data": {"val_shards": "/nowhere/val.tar"}},
        {"teacher": {"model": "timm/resnet18", "kwargs": {}}},
        {"teacher": {"mode": "online"}, "loss": [{**REVIEW, "student_layers": ["conv9"]}]},
        {"teacher": {"mode": "online"}, "loss": [{**REVIEW, "teacher_layers": ["fc"]}]},
    ],
    ids=[
        "unknown student",
        "missing validation shard",
        "another teacher than the cache's",
        "unknown layer of the student",
        "a layer of the teacher that is no map",
    ],
)
def test_what_would_stop_a_training_later_stops_it_first(
    sections: dict[str, Any], replays: Replay, tmp_path: Path
) -> None:
    config = run_config(replays("crop").config, tmp_path, **{"loss": KD, **sections})
    with pytest.raises(InputError):
        check_training(config)
    assert not list(tmp_path.iterdir())


def to_build(replays: Replay, tmp_path: Path, class_means: str, loss: list[dict[str, str]]) -> Config:
    cache = {"url": str(tmp_path / "cache"), "class_means": class_means}
    return run_config(replays("crop").config, tmp_path / "run", loss=loss, cache=cache)


def test_a_sound_config_passes_and_writes_nothing(replays: Replay, tmp_path: Path) -> None:
    check_training(run_config(replays("crop").config, tmp_path, loss=KD))
    check_distillation(to_build(replays, tmp_path, "eval", ND))
    assert not list(tmp_path.iterdir())


def test_a_cache_to_be_built_without_the_embeddings_that_a_loss_needs_is_refused(
    replays: Replay, tmp_path: Path
) -> None:
    cache = {"url": str(tmp_path / "cache"), "embeddings": "none"}
    config = run_config(replays("crop").config, tmp_path / "run", loss=[{"name": "cosine"}], cache=cache)
    with pytest.raises(ConfigError) as caught:
        check_distillation(config)
    assert (caught.value.code, caught.value.where) == ("cache.no-embeddings", "cache.embeddings")


def test_a_cache_to_be_built_without_the_means_that_nd_needs_is_refused(replays: Replay, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_distillation(to_build(replays, tmp_path, "none", ND))
    assert caught.value.code == "cache.no-class-means"
