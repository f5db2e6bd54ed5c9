"""Build and training with one command and one cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jobs.build_cache import build_cache
from jobs.distill import distill
from jobs.run_ops import evaluate
from jobs.train_student import train_student
from pipeline.core.errors import CacheError, ConfigError, StorageInputError
from pipeline.models.cifar import resnet
from schemas.config import Config
from tests.errors import raises
from tests.jobs.conftest import JsonLog, Tree, config_of, files_below


def test_several_caches_are_refused_before_one_is_built(tree: Tree, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        distill(config_of(tree(data={"cache": ["a", "b"]})))
    assert caught.value.got == "2 caches"
    assert not list(tmp_path.iterdir())


def test_a_finished_cache_needs_no_weights_of_its_teacher(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "teacher.pt"
    torch.save(resnet(num_classes=10, depth=8, widths=(4, 4, 6, 8)).state_dict(), weights)

    def config(run: str, **sections: dict[str, object]) -> Config:
        changes = {**sections, "teacher": {"weights": str(weights), **sections.get("teacher", {})}}
        student = {"kwargs": {"depth": 8, "widths": [16, 16, 32, 64]}}
        shared = {"train": {"epochs": 1}, "run": {"url": str(tmp_path / run)}, "student": student}
        return config_of(tree(**shared, data={"cache": str(tmp_path / "cache")}, **changes))

    manifest = build_cache(config("run"))
    weights.unlink()
    before = files_below(tmp_path / "cache")
    assert distill(config("distilled"))["steps"] == 4
    assert train_student(config("trained"))["steps"] == 4
    # Each command reports that the weights were not compared.
    assert capsys.readouterr().err.count(f"fingerprint {manifest.fingerprint}") == 3
    assert files_below(tmp_path / "cache") == before
    with raises("cache.other-header", CacheError, got="teacher.precision: fp32 -> bf16"):
        distill(config("run", teacher={"precision": "bf16"}))
    with raises("weights.unreadable", StorageInputError, where=f"teacher.weights: {weights}") as extended:
        build_cache(config("run", views={"count": 4}))
    assert "teacher.weights=URL" in str(extended.value.next_step)
    val_shards = str(config("run").data.val_shards)
    with raises("weights.unreadable", StorageInputError) as compared:
        evaluate(str(tmp_path / "trained"), val_shards)
    assert f"stillroom evaluate {tmp_path}/trained" in str(compared.value.next_step)
    assert "--without-teacher" in str(compared.value.next_step)
    measured = evaluate(str(tmp_path / "trained"), val_shards, with_teacher=False)
    assert (measured.num_rows, measured.metrics["agreement"]) == (24, None)


def test_moments_are_computed_before_a_training_that_standardises_targets(tree: Tree, json_log: JsonLog) -> None:
    sections = {"cache": {"embeddings": "fp16"}, "teacher": {"standardize": "phi_s"}, "train": {"epochs": 1}}
    assert distill(config_of(tree(**sections, loss=[{"name": "mse"}])))["steps"] == 4
    events = json_log()
    (moments,) = [event for event in events if "is_new" in event]
    begin = next(event for event in events if event["event"] == "begin")
    assert (moments["is_new"], moments["num_rows"]) == (True, 96 * 3)
    assert (begin["standardize"], begin["moments"]) == (["phi_s"], [moments["table"]["sha256"][:16]])


def test_changed_weights_of_a_finished_cache_are_refused(tree: Tree, tmp_path: Path) -> None:
    weights = tmp_path / "teacher.pt"
    config = config_of(tree(teacher={"weights": str(weights)}, data={"cache": str(tmp_path / "cache")}))
    for _ in range(2):
        torch.save(resnet(num_classes=10, depth=8, widths=(4, 4, 6, 8)).state_dict(), weights)
        if not (tmp_path / "cache").exists():
            build_cache(config)
    for run in (distill, train_student):
        with pytest.raises(CacheError):
            run(config)
    assert not (tmp_path / "run").exists()
