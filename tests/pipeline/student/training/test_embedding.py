"""Students of task embedding: trained without labels and heads, replayed, resumed, exported, and then fine-tuned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import stillroom
from pipeline.student.distributed import DistributedContext
from pipeline.student.evaluation.loaded_run import load_run
from pipeline.student.export.exporters import export_run
from pipeline.student.run import checkpoint
from pipeline.student.training.config_checks import check_training
from pipeline.student.training.setup import prepare
from schemas.config import Config
from tests.errors import raises
from tests.pipeline.caches import TinyCache, build, cache_section
from tests.pipeline.student.runs import (
    CE,
    check_resume,
    evaluations,
    index_shards,
    metrics,
    run,
    run_config,
    state_of,
    summary_of,
    training_error,
)
from tests.pipeline.tasks.test_embedding import embedding_config

STUDENT = {"model": "python:tests.pipeline.student.small_networks:normalised", "mean": [0.5] * 3, "std": [0.5] * 3}
# Also by a student of the teacher's width, which needs no projector.
EVERY_LOSS = [*({"name": name} for name in ("cosine", "mse", "smooth_l1", "sifn")), {"name": "similarity"}]


@pytest.fixture(scope="module")
def cache(built_cache: TinyCache, tmp_path_factory: pytest.TempPathFactory) -> TinyCache:
    """Of four mixed views of 35 images, in fp32. Never written to."""
    url = str(tmp_path_factory.mktemp("embedding") / "cache")
    keys = {"url": url, "embeddings": "fp32"}
    config = embedding_config(built_cache.config, cache=keys, views={"kind": "function_matching", "count": 4})
    build(config)
    return TinyCache(cache_section(config).url, config)


def config_of(cache: TinyCache, url: Path, *, mode: str = "cache", **sections: Any) -> Config:
    keys: dict[str, Any] = {"student": STUDENT, "loss": EVERY_LOSS, **sections}
    return run_config(cache.config, url, mode=mode, **keys)


@pytest.mark.parametrize("width", [8, 3])
def test_parity_every_loss_of_a_cached_run_is_that_of_an_online_run(
    cache: TinyCache, tmp_path: Path, width: int
) -> None:
    """Students of width 16, with projectors, and of the teacher's width 6."""
    keys: dict[str, Any] = {"student": {**STUDENT, "kwargs": {"width": width}}, "train": {"epochs": 4, "lr": 0.01}}
    run(config_of(cache, tmp_path / "cache", **keys))
    config = config_of(cache, tmp_path / "online", mode="online", **keys)
    run(config)
    pairs = list(zip(metrics(tmp_path / "cache"), metrics(tmp_path / "online"), strict=True))
    assert len(pairs) == 20
    for cached, online in pairs:
        assert {f"loss/{term['name']}" for term in EVERY_LOSS} < cached.keys()
        assert cached == pytest.approx(online, rel=training_error(config, cached["step"] + 1))


def test_a_run_measures_the_cosine_alone_and_resumes_bitwise(
    cache: TinyCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.student.training.trainer.FLUSH_STEPS", 1)

    def config(url: Path) -> Config:
        data = {"val_shards": cache.config.data.shards}
        train = {"epochs": 4, "lr": 0.02, "eval_agreement": True}
        return config_of(cache, url, loss=[{"name": "cosine"}, {"name": "mse"}], data=data, train=train)

    check_resume(config, tmp_path, stop=("step", 8), first_step=5)
    lines = evaluations(tmp_path / "stopped")
    assert all(not {"top1", "top5", "ece", "agreement", "kl"} & line.keys() for line in lines)
    assert lines[-1]["cosine"] > lines[0]["cosine"]
    assert summary_of(tmp_path / "stopped")["best_metric"] == "cosine"


@pytest.fixture(scope="module")
def finished(cache: TinyCache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("finished")
    run(config_of(cache, url, train={"epochs": 2, "lr": 0.01}))
    return url


@torch.no_grad()
@pytest.mark.parametrize("suffix", ["pt2", "safetensors"])
def test_the_backbone_is_exported(finished: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"student.{suffix}"
    done = export_run(str(finished), str(path))
    assert not done.head_left_out
    network = stillroom.load_student(str(finished), "last")
    images_BCHW = torch.rand(3, 3, 16, 16)
    if suffix == "pt2":
        embedding_BD = torch.export.load(path).module()(images_BCHW)
        torch.testing.assert_close(embedding_BD, network(images_BCHW))
        assert embedding_BD.shape == (3, 16)
    else:
        with safe_open(path, "pt") as file:
            assert {*file.keys()} == network.state_dict().keys()
            assert file.metadata()["num_classes"] == "0"


@pytest.mark.parametrize("source", ["run", "best", "exported"])
def test_a_classifier_starts_from_the_backbone_of_such_a_run(
    built_cache: TinyCache, finished: Path, tmp_path: Path, source: str
) -> None:
    weights = {
        "run": str(finished),
        "best": str(finished / checkpoint.LAST),
        "exported": str(tmp_path / "s.safetensors"),
    }
    if source == "exported":
        export_run(str(finished), weights[source])
    config = run_config(
        built_cache.config, tmp_path / "tuned", mode="none", student={**STUDENT, "weights": weights[source]}, loss=CE
    )
    index_shards(config, tmp_path / "tuned" / "index")
    setup = prepare(config, DistributedContext())
    try:
        state, trained = setup.student.module.model.network.state_dict(), state_of(finished)["model"]
        assert trained.keys() == state.keys() - {"fc.weight", "fc.bias"}
        assert all(torch.equal(state[name], tensor) for name, tensor in trained.items())
        assert any("fc.bias" in note or "fc.weight" in note for note in setup.student.warnings)
    finally:
        setup.close()


def test_losses_on_logits_or_labels_are_refused(cache: TinyCache, tmp_path: Path) -> None:
    for loss in ("kd", "ce", "nd"):
        with raises("loss.other-task", where="loss.0.name"):
            check_training(config_of(cache, tmp_path, loss=[{"name": loss}]))


@pytest.mark.slow
def test_a_dinov2_architecture_teaches_a_small_network(built_cache: TinyCache, tmp_path: Path) -> None:
    teacher = {"model": "timm/vit_small_patch14_dinov2", "kwargs": {"img_size": 28}, "mean": None, "std": None}
    config = embedding_config(
        built_cache.config,
        cache={"url": str(tmp_path / "cache"), "tokens": "int8", "tokens_grid": 1},
        teacher=teacher,
        views={"kind": "crop", "count": 1, "size": 28},
    )
    build(config)
    loss = [{"name": "cosine"}, {"name": "token_cosine", "student_layer": "conv2"}]
    run(run_config(config, tmp_path / "run", student=STUDENT, loss=loss, train={"epochs": 1}))
    assert metrics(tmp_path / "run")[-1]["loss/token_cosine"] < 2
    assert load_run(str(tmp_path / "run"), "last").student.module.widths == {"embedding": 16}
