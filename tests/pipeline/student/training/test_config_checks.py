"""Errors in a config are detected before any work, and leave no files behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import InputError
from pipeline.student.training.config_checks import check_config, check_distillation, check_training
from schemas.config import Config
from tests.errors import raises
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
    with raises(code):
        check_config(run_config(replays("crop").config, tmp_path, **sections))


def test_dist_over_all_ranks_and_micro_batches_do_not_go_together(replays: Replay, tmp_path: Path) -> None:
    gathered = [{"name": "dist", "gather": True}]
    base = replays("crop").config
    check_config(run_config(base, tmp_path, loss=gathered))
    with raises("config.gather-accumulate"):
        check_config(run_config(base, tmp_path, loss=gathered, train={"accumulate": 2}))


def test_a_run_in_the_folder_of_its_cache_is_refused(replays: Replay) -> None:
    cache = replays("crop")
    with raises("config.run-in-cache"):
        check_config(run_config(cache.config, Path(cache.url), loss=KD))


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


def planned(replays: Replay, tmp_path: Path, loss: list[dict[str, Any]], **cache: str) -> Config:
    cache = {"url": str(tmp_path / "cache"), **cache}
    return run_config(replays("crop").config, tmp_path / "run", loss=loss, cache=cache)


def test_a_sound_config_passes_and_writes_nothing(replays: Replay, tmp_path: Path) -> None:
    check_training(run_config(replays("crop").config, tmp_path, loss=KD))
    check_distillation(planned(replays, tmp_path, ND, logits="none", embeddings="none", class_means="eval"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "key"), [("kd", "logits"), ("cosine", "embeddings"), ("nd", "class_means")])
def test_a_cache_to_be_built_without_what_a_loss_reads_is_refused(
    replays: Replay, tmp_path: Path, name: str, key: str
) -> None:
    with raises(f"cache.no-{key.replace('_', '-')}", where=f"cache.{key}"):
        check_distillation(planned(replays, tmp_path, [{"name": name}], **{key: "none"}))
