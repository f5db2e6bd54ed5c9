"""Standardised targets: rotations with equal variances, against scikit-learn and SciPy; the losses that take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from pipeline.cache.build.moments import EmbeddingMoments
from pipeline.cache.ops.moments import compute_moments
from pipeline.cache.read.reader import open_cache
from pipeline.core.errors import CacheError, ConfigError
from pipeline.student.supervision.rotations import _plane_rotations, hadamard, phi_s_rotation
from pipeline.student.supervision.standardization import Standardizer
from pipeline.student.training.config_checks import check_config, check_plan, check_training
from pipeline.student.training.trainer import train
from schemas.config import Config
from tests.errors import raises
from tests.pipeline.caches import TinyCache, build, cache_section, shard_urls
from tests.pipeline.student.conftest import NUM_VIEWS, Replay
from tests.pipeline.student.runs import (
    NORMALISED,
    assert_bitwise,
    evaluated,
    index_shards,
    metrics,
    run,
    run_config,
    state_of,
    train_until,
    trainer_of,
    training_error,
)
from tests.pipeline.tasks.test_embedding import TOWER, embedding_config

CPU = torch.device("cpu")
EMBEDDING_LOSSES: list[dict[str, Any]] = [{"name": name} for name in ("cosine", "mse", "smooth_l1", "similarity")]
MSE = [{"name": "mse"}]


def rows(dim: int, num_rows: int = 400) -> NDArray[np.float64]:
    """Correlated dimensions whose scales differ by four orders of magnitude, away from 0."""
    random = np.random.default_rng(dim)
    mixed_ND = random.normal(size=(num_rows, dim)) @ random.normal(size=(dim, dim))
    return mixed_ND * 10.0 ** random.uniform(-2, 2, dim) + random.normal(size=dim)


def moments_of(rows_ND: NDArray[np.float64]) -> EmbeddingMoments:
    covariance_DD = np.cov(rows_ND, rowvar=False).reshape(rows_ND.shape[1], -1)
    return EmbeddingMoments(rows_ND.mean(0), covariance_DD, "")


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 7, 12, 13, 24, 30, 64])
def test_a_rotation_is_orthogonal_and_gives_equal_variances(dim: int) -> None:
    covariance_DD = moments_of(rows(dim)).covariance_DD
    rotation_DD = phi_s_rotation(covariance_DD)
    np.testing.assert_allclose(rotation_DD.T @ rotation_DD, np.eye(dim), atol=1e-13)
    rotated_DD = rotation_DD.T @ covariance_DD @ rotation_DD
    np.testing.assert_allclose(np.diag(rotated_DD), np.trace(covariance_DD) / dim, rtol=1e-11)


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 24, 44, 384, 768, 1024, 1152, 1280, 1536])
def test_hadamard_matrices_have_orthogonal_columns_of_signs(size: int) -> None:
    matrix = hadamard(size)
    assert matrix is not None
    assert matrix.shape == (size, size)
    assert (np.abs(matrix) == 1).all()
    assert np.array_equal(matrix.T @ matrix, size * np.eye(size))


@pytest.mark.parametrize("size", [3, 5, 6, 10, 100])
def test_other_sizes_have_none_and_are_turned_plane_by_plane(size: int) -> None:
    assert hadamard(size) is None
    variance_D = 10.0 ** np.random.default_rng(size).uniform(-8, 2, size)
    rotation_DD = _plane_rotations(variance_D)
    np.testing.assert_allclose(rotation_DD.T @ rotation_DD, np.eye(size), atol=1e-13)
    rotated_DD = rotation_DD.T @ np.diag(variance_D) @ rotation_DD
    np.testing.assert_allclose(np.diag(rotated_DD), variance_D.mean(), rtol=1e-11)


@pytest.mark.parametrize("dim", [2, 8, 16])
def test_phi_s_is_sklearns_pca_and_scipys_hadamard_matrix(dim: int) -> None:
    rows_ND = rows(dim)
    pca = PCA().fit(rows_ND)
    largest_D1 = np.abs(pca.components_).argmax(1)[:, None]
    components_DD = pca.components_ * np.sign(np.take_along_axis(pca.components_, largest_D1, axis=1))
    scale = np.sqrt(pca.explained_variance_.mean())
    expected_ND = (rows_ND - pca.mean_) @ components_DD.T @ scipy.linalg.hadamard(dim) / np.sqrt(dim) / scale
    standardizer = Standardizer.of("phi_s", moments_of(rows_ND), CPU, where="here")
    found_ND = standardizer(torch.from_numpy(rows_ND)).numpy()
    np.testing.assert_allclose(found_ND, expected_ND, atol=2e-4)
    np.testing.assert_allclose(found_ND.astype(np.float64).std(0, ddof=1), 1, rtol=1e-5)
    np.testing.assert_allclose(found_ND.astype(np.float64).mean(0), 0, atol=1e-5)


def test_mean_std_is_sklearns_scaler_and_leaves_constant_dimensions_at_0() -> None:
    rows_ND = rows(6)
    rows_ND[:, 4] = 3.0
    expected_ND = StandardScaler().fit_transform(rows_ND) * np.sqrt((len(rows_ND) - 1) / len(rows_ND))
    found_ND = Standardizer.of("mean_std", moments_of(rows_ND), CPU, where="here")(torch.from_numpy(rows_ND)).numpy()
    np.testing.assert_allclose(found_ND, expected_ND, atol=1e-4)
    assert (found_ND[:, 4] == 0).all()


@pytest.mark.parametrize("kind", ["mean_std", "phi_s"])
def test_equal_embeddings_are_refused(kind: str) -> None:
    with raises("cache.constant-embeddings", CacheError, where="here"):
        Standardizer.of(kind, moments_of(np.ones((9, 4))), CPU, where="here")


def test_autocast_does_not_round_targets() -> None:
    rows_ND = rows(8)
    standardizer = Standardizer.of("phi_s", moments_of(rows_ND), CPU, where="here")
    embedding_ND = torch.from_numpy(rows_ND).float()
    with torch.autocast("cpu", torch.bfloat16):
        found_ND = standardizer(embedding_ND)
    assert torch.equal(found_ND, standardizer(embedding_ND))


@pytest.fixture
def cache(replay_copy: Replay) -> TinyCache:
    """Of mixed views, in fp32, with moments."""
    cache = replay_copy("function_matching", num_views=4)
    compute_moments(cache.url)
    return cache


def config_of(cache: TinyCache, url: Path, kind: Any = "phi_s", *, mode: str = "cache", **sections: Any) -> Config:
    teacher = {
        "standardize": kind,
        **({"moments": cache.url} if mode == "online" else {}),
        **sections.pop("teacher", {}),
    }
    return run_config(cache.config, url, mode=mode, **{"loss": MSE, "teacher": teacher, **sections})


def test_losses_compare_the_embeddings_of_all_views_with_variance_1(cache: TinyCache, tmp_path: Path) -> None:
    opened = open_cache(cache.url)
    stored = [opened.view(shard.shard_id, view).decoded("embedding") for shard in opened.shards for view in range(4)]
    stored_ND = np.concatenate(stored).astype(np.float64)
    scaler, varies_D = StandardScaler().fit(stored_ND), stored_ND.std(0) > 0
    trainer = trainer_of(config_of(cache, tmp_path / "run", "mean_std", train={"epochs": 4}))
    try:
        found: list[NDArray[np.float64]] = []
        for number in range(trainer.setup.total_steps):
            batch = trainer.setup.dataset[number]
            student = trainer.train_step.forward(torch.zeros(batch.num_rows, 3, 16, 16))
            (teacher,) = trainer.train_step.loss_inputs(student, batch).teachers
            found.append(teacher.standardized["embedding"].double().numpy())
            raw = teacher.outputs.at("embedding")
            assert raw is not None
            np.testing.assert_allclose(found[-1], scaler.transform(raw.double().numpy()), rtol=0.005, atol=1e-5)
        found_ND = np.concatenate(found)
        assert len(found_ND) == 4 * 35
        np.testing.assert_allclose(found_ND[:, varies_D].std(0, ddof=1), 1, rtol=1e-5)
    finally:
        trainer.setup.close()


def test_parity_of_a_cached_and_an_online_run(cache: TinyCache, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"student": NORMALISED, "loss": EMBEDDING_LOSSES, "train": {"epochs": 4, "lr": 0.01}}
    for kind in ("mean_std", "phi_s"):
        run(config_of(cache, tmp_path / f"{kind}-cache", kind, **keys))
        config = config_of(cache, tmp_path / f"{kind}-online", kind, mode="online", **keys)
        run(config)
        pairs = zip(metrics(tmp_path / f"{kind}-cache"), metrics(tmp_path / f"{kind}-online"), strict=True)
        for cached, online in pairs:
            assert cached == pytest.approx(online, rel=training_error(config, cached["step"] + 1))
    first = [metrics(tmp_path / name)[0] for name in ("mean_std-cache", "phi_s-cache")]
    assert first[0]["loss/mse"] != pytest.approx(first[1]["loss/mse"], rel=1e-3)


def test_nd_takes_norms_and_class_means_as_they_are(cache: TinyCache, tmp_path: Path) -> None:
    losses = [{"name": "nd"}, {"name": "mse", "weight": 0}]
    run(config_of(cache, tmp_path / "plain", "none", loss=losses))
    for mode in ("cache", "online"):
        teacher = {"class_means": cache.url} if mode == "online" else {}
        run(config_of(cache, tmp_path / mode, mode=mode, loss=losses, teacher=teacher))
    error = training_error(config_of(cache, tmp_path / "run"), len(metrics(tmp_path / "plain")))
    for plain, cached, online in zip(*(metrics(tmp_path / name) for name in ("plain", "cache", "online")), strict=True):
        assert cached["loss/nd"] == plain["loss/nd"]
        assert online["loss/nd"] == pytest.approx(plain["loss/nd"], rel=error)
        assert cached["loss/mse"] != plain["loss/mse"]


def test_evaluations_compare_embeddings_as_the_loss_does(cache: TinyCache, tmp_path: Path) -> None:
    """The student's first cosines are to targets of mean 0, far below those of ReLU embeddings, which are positive."""
    shards = shard_urls(cache.config)["digits-01"]
    keys: dict[str, Any] = {"data": {"val_shards": shards}, "train": {"epochs": 6, "lr": 0.02}}
    values: dict[str, float] = {}
    for kind in ("none", "mean_std"):
        config = config_of(cache, tmp_path / kind, kind, loss=[{"name": "cosine"}], student=NORMALISED, **keys)
        events = run(config)
        value = evaluated(config).metrics["cosine"]
        assert value is not None
        values[kind] = value
        begin = next(event for event in events if event["kind"] == "begin")
        assert begin.get("standardize") == (None if kind == "none" else ("mean_std",))
    assert values["mean_std"] < 0.9 < values["none"]


def test_a_run_keeps_the_moments_that_it_was_started_with(cache: TinyCache, tmp_path: Path) -> None:
    straight = config_of(cache, tmp_path / "straight")
    train(straight)
    config = config_of(cache, tmp_path / "run")
    train_until(config, lambda event: event["kind"] == "step")
    pinned = (tmp_path / "run" / "moments.json").read_bytes()
    assert pinned in [path.read_bytes() for path in Path(cache.url, "moments").glob("*.json")]
    views = cache.config.views.model_copy(update={"count": NUM_VIEWS})
    build(cache.config.model_copy(update={"views": views}))
    compute_moments(cache.url)
    train(config)
    assert (tmp_path / "run" / "moments.json").read_bytes() == pinned
    assert_bitwise(state_of(tmp_path / "run")["model"], state_of(tmp_path / "straight")["model"])


def test_a_cache_without_moments_is_refused_before_any_work(replays: Replay, tmp_path: Path) -> None:
    cache = replays("crop")
    for mode in ("cache", "online"):
        config = config_of(cache, tmp_path / mode, mode=mode)
        index_shards(config, tmp_path / "index")
        for refuse in (train, check_training):
            with raises("cache.no-moments", CacheError, where=cache.url) as caught:
                refuse(config)
            assert f"stillroom cache moments {cache.url}" in str(caught.value.next_step)
        assert not (tmp_path / mode / "config.json").exists()


def test_moments_of_another_teacher_are_refused(cache: TinyCache, tmp_path: Path) -> None:
    config = config_of(cache, tmp_path / "run", mode="online", teacher={"mean": [0.1, 0.2, 0.3]})
    index_shards(config, tmp_path / "run" / "index")
    with raises("cache.other-teacher", CacheError, where=f"teacher.moments: {cache.url}"):
        train(config)


@pytest.mark.parametrize(
    ("mode", "teacher", "code"),
    [
        ("cache", {"standardize": ["phi_s", "none"]}, "config.other-number-of-teachers"),
        ("cache", {"standardize": []}, "config.other-number-of-teachers"),
        ("cache", {"loss_weights": [1.0, 2.0]}, "config.other-number-of-teachers"),
        ("none", {"standardize": "phi_s"}, "config.other-number-of-teachers"),
        ("none", {"loss_weights": [1.0]}, "config.other-number-of-teachers"),
        ("cache", {"moments": "x"}, "config.moments-unused"),
        ("online", {"moments": "x", "standardize": "none"}, "config.moments-unused"),
        ("online", {"moments": None}, "config.no-moments"),
    ],
)
def test_keys_that_do_not_fit_the_teachers_are_refused(
    replays: Replay, tmp_path: Path, mode: str, teacher: dict[str, Any], code: str
) -> None:
    kind = "phi_s" if mode == "online" else "none"
    loss = [{"name": "ce"}] if mode == "none" else MSE
    config = config_of(replays("crop"), tmp_path, kind, mode=mode, loss=loss, teacher=teacher)
    with raises(code, ConfigError):
        check_config(config)


def test_standardising_what_no_loss_compares_is_refused(cache: TinyCache, tmp_path: Path) -> None:
    config = config_of(cache, tmp_path / "run", loss=[{"name": "kd"}])
    for refuse in (train, check_training):
        with raises("config.standardize-unused", ConfigError):
            refuse(config)
    check_training(config_of(cache, tmp_path / "run", ["none"], loss=[{"name": "kd"}]))
    planned = config.model_copy(update={"cache": cache_section(cache.config)})
    with raises("config.standardize-unused", ConfigError):
        check_plan(planned)


def test_teachers_have_weights_and_standardisations_of_their_own(
    replay_copy: Replay, wide_caches: Replay, tmp_path: Path
) -> None:
    """Two teachers of different widths; the cosine of each is a value, and their weighted sum the loss."""
    cache, wide = replay_copy("crop"), wide_caches("crop")
    compute_moments(cache.url)
    config = config_of(
        cache,
        tmp_path / "run",
        ["mean_std", "none"],
        data={"cache": [cache.url, wide.url]},
        loss=[{"name": "cosine", "weight": 2.0}],
        student={**NORMALISED, "size": 16},
        teacher={"loss_weights": [0.5, 3.0], "model": None, "weights": None, "kwargs": {}, "mean": None, "std": None},
    )
    events = run(config)
    begin = next(event for event in events if event["kind"] == "begin")
    assert (begin["standardize"], begin["teacher_weights"]) == (("mean_std", "none"), (0.5, 3.0))
    assert [digest is None for digest in begin["moments"]] == [False, True]
    assert not (tmp_path / "run" / "moments-1.json").exists()
    for record in metrics(tmp_path / "run"):
        expected = 0.5 * record["loss/cosine/0"] + 3.0 * record["loss/cosine/1"]
        assert record["loss/cosine"] == pytest.approx(expected, rel=1e-6)
        assert record["loss"] == pytest.approx(2 * expected, rel=1e-6)


def test_parity_of_several_teachers_without_classifiers(built_cache: TinyCache, tmp_path: Path) -> None:
    """Two towers, each standardised in another way and with another weight; cached and online, without labels."""
    caches: list[TinyCache] = []
    for number, kwargs in enumerate(({}, {"width": 9})):
        section = {"url": str(tmp_path / f"cache-{number}"), "embeddings": "fp32"}
        views = {"kind": "function_matching", "count": 2}
        config = embedding_config(built_cache.config, cache=section, views=views, teacher={**TOWER, "kwargs": kwargs})
        build(config)
        compute_moments(section["url"])
        caches.append(TinyCache(section["url"], config))
    first, second = caches
    student = {"model": "python:tests.pipeline.student.small_networks:normalised", "mean": [0.5] * 3, "std": [0.5] * 3}
    keys: dict[str, Any] = {"student": student, "loss": EMBEDDING_LOSSES, "train": {"epochs": 2, "lr": 0.01}}
    how = {"standardize": ["phi_s", "mean_std"], "loss_weights": [1.0, 0.25]}
    alone = dict.fromkeys(("model", "weights", "mean", "std"))
    data = {"cache": [first.url, second.url]}
    run(run_config(first.config, tmp_path / "cached", **keys, data=data, teacher={**how, **alone, "kwargs": {}}))
    other = second.config.teacher.model_dump(include={"model", "weights", "kwargs", "mean", "std"})
    online = {**how, "moments": first.url, "others": [{**other, "moments": second.url}]}
    config = run_config(first.config, tmp_path / "online", mode="online", **keys, teacher=online)
    run(config)
    pairs = list(zip(metrics(tmp_path / "cached"), metrics(tmp_path / "online"), strict=True))
    assert len(pairs) == 10
    for cached, record in pairs:
        assert {f"loss/{term['name']}/{number}" for term in EMBEDDING_LOSSES for number in range(2)} < cached.keys()
        assert cached == pytest.approx(record, rel=training_error(config, cached["step"] + 1))
