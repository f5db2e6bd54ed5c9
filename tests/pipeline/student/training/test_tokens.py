"""Trainings on patch tokens: cached as online, of teachers with other grids, resumed, and what they refuse."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cache.ops.moments import compute_moments
from pipeline.cache.read.reader import open_cache
from pipeline.core.errors import ConfigError, ModelError
from pipeline.student.cached_dataset import CachedDataset
from pipeline.student.training.config_checks import check_distillation, check_training, training_of
from schemas.config import Config
from tests.errors import raises
from tests.pipeline.caches import TinyCache, build, cache_section
from tests.pipeline.student.runs import (
    check_resume,
    metrics,
    run,
    run_config,
    state_of,
    training_error,
    warnings_of,
)

# At 16 pixels 8×8 positions of width 8, and 4×4 of width 16.
STUDENT = {"model": "python:tests.pipeline.student.small_networks:normalised", "mean": [0.5] * 3, "std": [0.5] * 3}
LOSS: list[dict[str, Any]] = [
    {"name": "token_cosine", "student_layer": "conv1"},
    {"name": "token_mse", "student_layer": "conv2"},
    {"name": "cosine"},
]
# Of a teacher's 8×8 positions of width 6, and of its 16×16 of width 4, both pooled.
LAYERS = {"deep": ("layer2", 4), "shallow": ("layer1", 8)}


def cache_of(base: Config, url: Path, encoding: str, which: str = "deep") -> TinyCache:
    layer, grid = LAYERS[which]
    tree = base.model_dump(mode="json", exclude_unset=True)
    tree["teacher"] |= {"tokens_layer": layer}
    tree["views"] |= {"count": 4}
    tree["cache"] |= {"url": str(url), "tokens": encoding, "tokens_grid": grid, "class_means": "none"}
    config = Config.model_validate(tree)
    build(config)
    return TinyCache(cache_section(config).url, config)


@pytest.fixture(scope="module")
def caches(built_cache: TinyCache, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyCache]:
    """Of four mixed views of 35 images. Only moments are added to them."""
    folder, base = tmp_path_factory.mktemp("tokens"), built_cache.config
    exact = {which: cache_of(base, folder / which, "fp32", which) for which in LAYERS}
    return {**exact, "int8": cache_of(base, folder / "int8", "int8")}


def config_of(cache: TinyCache, url: Path, *, mode: str = "cache", **sections: Any) -> Config:
    keys = {"student": STUDENT, "loss": LOSS, "train": {"epochs": 2, "lr": 0.01}, **sections}
    return run_config(cache.config, url, mode=mode, **keys)


def online_of(cache: TinyCache, url: Path, which: str = "deep", **sections: Any) -> Config:
    teacher = {"tokens_grid": LAYERS[which][1], **sections.pop("teacher", {})}
    return config_of(cache, url, mode="online", teacher={"mode": "online", **teacher}, **sections)


def assert_parity(cached: Path, online: Path, config: Config) -> None:
    pairs = list(zip(metrics(cached), metrics(online), strict=True))
    assert len(pairs) == 10
    for first, second in pairs:
        assert {f"loss/{term['name']}" for term in LOSS} < first.keys()
        assert first == pytest.approx(second, rel=training_error(config, first["step"] + 1))


def test_parity_losses_on_tokens_of_a_cached_run_are_those_of_an_online_run(
    caches: dict[str, TinyCache], tmp_path: Path
) -> None:
    """Resampled to a coarser grid and on the same one, through projectors, of mixed views. In int8, which rounds each
    number by at most half a step, the error of the first step's mean square is bounded by Cauchy and Schwarz."""
    run(config_of(caches["deep"], tmp_path / "cache"))
    online = online_of(caches["deep"], tmp_path / "online")
    run(online)
    assert_parity(tmp_path / "cache", tmp_path / "online", online)
    run(config_of(caches["int8"], tmp_path / "int8", train={"epochs": 1}))
    exact, coarse = (metrics(tmp_path / name)[0]["loss/token_mse"] for name in ("online", "int8"))
    tokens = [open_cache(caches["deep"].url).view(shard, 0).decoded("tokens") for shard in ("digits-00", "digits-01")]
    half_step = max(float((view.max((1, 2)) - view.min((1, 2))).max()) for view in tokens) / 255 / 2
    assert exact != coarse
    assert abs(exact - coarse) <= 2 * exact**0.5 * half_step + half_step**2


def test_two_teachers_with_other_grids_and_widths_are_compared_each_on_its_grid(
    caches: dict[str, TinyCache], tmp_path: Path
) -> None:
    urls = [caches["deep"].url, caches["shallow"].url]
    weights = {"loss_weights": [1.0, 0.5]}
    run(config_of(caches["deep"], tmp_path / "cache", data={"cache": urls}, teacher={"model": None, **weights}))
    other = caches["shallow"].config.teacher.model_dump(mode="json", exclude_unset=True)
    other |= {"tokens_grid": LAYERS["shallow"][1]}
    online = online_of(caches["deep"], tmp_path / "online", teacher={"others": [other], **weights})
    run(online)
    assert_parity(tmp_path / "cache", tmp_path / "online", online)
    names = metrics(tmp_path / "cache")[0].keys()
    assert {"loss/token_cosine/0", "loss/token_cosine/1", "loss/token_mse/0", "loss/token_mse/1"} < names
    shapes = {name: tuple(value.shape) for name, value in state_of(tmp_path / "cache")["projectors"].items()}
    # conv1 has width 8, conv2 has 16.
    assert shapes["token_cosine.0.project.1.weight"] == (6, 8)
    assert shapes["token_cosine.1.project.1.weight"] == (4, 8)
    assert shapes["token_mse.1.project.1.weight"] == (4, 16)


def test_a_run_resumes_bitwise(caches: dict[str, TinyCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.student.training.trainer.FLUSH_STEPS", 1)

    def config(url: Path) -> Config:
        train = {"epochs": 2, "lr": 0.02, "eval_agreement": True}
        return config_of(caches["int8"], url, data={"val_shards": caches["int8"].config.data.shards}, train=train)

    check_resume(config, tmp_path, stop=("step", 7), first_step=5)
    losses = [record["loss"] for record in metrics(tmp_path / "stopped")]
    assert losses[-1] < losses[0]


def test_tokens_and_feature_maps_of_one_layer_are_taken_in_one_forward(
    caches: dict[str, TinyCache], tmp_path: Path
) -> None:
    """The first step's losses on tokens do not change where ``review_kd`` takes maps of the same layers too."""
    layers = {"student_layers": ["conv1", "conv2"], "teacher_layers": ["layer1", "layer2"], "mid_channels": 4}
    tokens, review = LOSS[:2], {"name": "review_kd", "embedding": False, **layers}
    run(online_of(caches["deep"], tmp_path / "tokens", loss=tokens, train={"epochs": 1}))
    run(online_of(caches["deep"], tmp_path / "both", loss=[*tokens, review], train={"epochs": 1}))
    alone, both = (metrics(tmp_path / name)[0] for name in ("tokens", "both"))
    assert both["loss/review_kd"] > 0
    assert {name: both[name] for name in ("loss/token_cosine", "loss/token_mse")} == {
        name: value for name, value in alone.items() if name.startswith("loss/token")
    }


def test_a_training_warns_that_tokens_are_not_standardised(caches: dict[str, TinyCache], tmp_path: Path) -> None:
    compute_moments(caches["deep"].url)
    teacher = {"standardize": "mean_std"}
    texts = warnings_of(config_of(caches["deep"], tmp_path, loss=LOSS[1:], teacher=teacher, train={"epochs": 1}))
    assert [text for text in texts if "teacher.standardize" in text and "token_mse" in text]


def test_a_dataset_for_other_loops_has_the_cached_tokens(caches: dict[str, TinyCache], built_cache: TinyCache) -> None:
    options: dict[str, Any] = {"global_batch_size": 8, "tail": "short", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    cache = open_cache(caches["int8"].url)
    stored = {
        f"{shard.shard_id}/{key.as_py()}": row
        for shard in cache.shards
        for key, row in zip(cache.index(shard).keys, cache.view(shard.shard_id, 1).decoded("tokens"), strict=True)
    }
    with closing(CachedDataset(caches["int8"].url, epoch=1, tokens=True, **options)) as dataset:
        batch = dataset[0]
    assert batch.teacher_tokens().shape == (8, 16, 6)
    for name, tokens_PD in zip(batch.sample_ids, batch.teacher_tokens(), strict=True):
        np.testing.assert_array_equal(tokens_PD, stored[name])
    with raises("cache.no-tokens", ConfigError):
        CachedDataset(built_cache.url, tokens=True, **options)
    with closing(CachedDataset(caches["int8"].url, **options)) as dataset, raises("cache.tokens-not-read", ConfigError):
        dataset[0].teacher_tokens()


def test_what_does_not_fit_is_refused_before_the_first_step(
    caches: dict[str, TinyCache], built_cache: TinyCache, tmp_path: Path
) -> None:
    deep = caches["deep"]
    with raises("cache.no-tokens", ConfigError):
        check_training(config_of(built_cache, tmp_path))
    planned = built_cache.config.model_dump(mode="json", exclude_unset=True)
    planned |= {"student": STUDENT, "loss": LOSS, "run": {"url": str(tmp_path)}}
    with raises("cache.no-tokens", ConfigError, where="cache.tokens"):
        check_distillation(training_of(Config.model_validate(planned)))
    with raises("model.unknown-layer", ModelError, where="student_layer of token_mse", got="norm"):
        check_training(config_of(deep, tmp_path, loss=[{"name": "token_mse"}]))
    with raises("config.tokens-grid", ConfigError, where="teacher.tokens_grid"):
        check_training(online_of(deep, tmp_path, teacher={"tokens_grid": 3}))
    with raises("config.tokens-unused", ConfigError, where="teacher.tokens_grid"):
        check_training(config_of(deep, tmp_path, teacher={"tokens_grid": 4}))
    with raises("config.tokens-unused", ConfigError, where="teacher.tokens_grid"):
        check_training(online_of(deep, tmp_path, loss=[{"name": "cosine"}]))
    with raises("config.tokens-unused", ConfigError, where="teacher.tokens_layer"):
        check_training(online_of(deep, tmp_path, loss=[{"name": "cosine"}], teacher={"tokens_grid": None}))
    views = {"kind": "crop", "seed": 3}
    with raises("config.tokens-views", ConfigError, where="student.views"):
        check_training(online_of(deep, tmp_path, views={"kind": "crop"}, student={**STUDENT, "views": views}))
    with raises("cache.other-teacher"):
        check_training(config_of(deep, tmp_path, teacher={"tokens_layer": "layer1"}))
