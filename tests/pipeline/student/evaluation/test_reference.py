"""Nearest neighbours and the linear probe on embeddings, against loops in float64 and scikit-learn."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from pipeline.augment.params import sample_keys
from pipeline.core.errors import ConfigError
from pipeline.shards.writer import pack_shards
from pipeline.student.evaluation.evaluator import evaluate_run
from pipeline.student.evaluation.loaded_run import load_run
from pipeline.student.evaluation.metrics import Evaluation
from pipeline.student.evaluation.metrics.embedding import KNN, PROBE
from pipeline.student.evaluation.metrics.reference import Reference
from pipeline.student.evaluation.reference_images import ReferenceImages
from pipeline.student.training.config_checks import check_training
from schemas.config import Config
from tests.errors import raises
from tests.pipeline.caches import TinyCache, build, digit_samples
from tests.pipeline.student.evaluation.test_evaluator import one_by_one
from tests.pipeline.student.runs import evaluations, run, run_config, state_of, summary_of, warnings_of
from tests.pipeline.tasks.test_embedding import embedding_config
from tests.ranks import group, run_two_ranks

HEADS = {"task": "heads", "label": "json", "heads": {"even": {"num_classes": 2}}}
CPU = torch.device("cpu")


def clusters(num_rows: int, *, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of three classes (2, 5 and 9), around one direction each, of different lengths."""
    random = np.random.default_rng(seed)
    number_N = random.integers(0, 3, num_rows)
    values_ND = np.eye(4)[number_N] + spread * random.normal(size=(num_rows, 4))
    values_ND *= random.uniform(0.1, 9, (num_rows, 1))
    return torch.from_numpy(values_ND).float(), torch.from_numpy(np.array([2, 5, 9])[number_N])


def reference_of(num_rows: int, *, spread: float, held_out_one_in: int = 4) -> Reference:
    embedding_RD, label_R = clusters(num_rows, spread=spread, seed=0)
    return Reference(embedding_RD, label_R, torch.arange(num_rows) % held_out_one_in == 0, fits_probe=True)


@pytest.mark.parametrize("num_rows", [7, 60])
def test_neighbours_vote_by_the_exponential_of_their_cosine(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.student.evaluation.metrics.reference._MAX_SIMILARITIES", 11 * num_rows)
    reference, (query_ND, _) = reference_of(num_rows, spread=0.8), clusters(50, spread=0.8, seed=1)
    rows = reference.embedding_RD.double().tolist()
    expected: list[int] = []
    for query in query_ND.double().tolist():
        cosines = [
            sum(a * b for a, b in zip(query, row, strict=True)) / (math.hypot(*query) * math.hypot(*row))
            for row in rows
        ]
        nearest = sorted(range(num_rows), key=lambda row: -cosines[row])[:20]
        votes = dict.fromkeys(reference.label_R.tolist(), 0.0)
        for row in nearest:
            votes[int(reference.label_R[row])] += math.exp(cosines[row] / 0.07)
        expected.append(max(votes, key=lambda label: votes[label]))
    assert reference.knn(query_ND).tolist() == expected
    assert len(set(expected)) == 3


def test_the_probe_is_the_regression_whose_penalty_is_best_on_the_held_out_images() -> None:
    reference, (query_ND, _) = reference_of(80, spread=0.8), clusters(50, spread=0.8, seed=1)
    values_RD, label_R = reference.embedding_RD.double().numpy(), reference.label_R.numpy()
    held_out_R = reference.is_held_out_R.numpy()

    def fitted(rows_R: Any, c: float) -> tuple[LogisticRegression, Any, Any]:
        mean_D, std_D = values_RD[rows_R].mean(0), values_RD[rows_R].std(0)
        model = LogisticRegression(C=c, max_iter=2000)
        return model.fit((values_RD[rows_R] - mean_D) / std_D, label_R[rows_R]), mean_D, std_D

    scores: dict[float, float] = {}
    for c in (0.001, 0.01, 0.1, 1.0, 10.0, 100.0):
        model, mean_D, std_D = fitted(~held_out_R, c)
        scores[c] = float(np.mean(model.predict((values_RD[held_out_R] - mean_D) / std_D) == label_R[held_out_R]))
    assert len(set(scores.values())) > 1
    best = max(scores, key=lambda c: scores[c])
    model, mean_D, std_D = fitted(np.ones(80, bool), best)
    expected = np.asarray(model.predict((query_ND.double().numpy() - mean_D) / std_D))
    assert reference.probe(query_ND).tolist() == expected.tolist()


def test_without_held_out_images_the_penalty_of_the_probe_is_1() -> None:
    reference, (query_ND, _) = reference_of(30, spread=0.8), clusters(50, spread=0.8, seed=1)
    few = Reference(reference.embedding_RD, reference.label_R, torch.zeros(30, dtype=torch.bool), fits_probe=True)
    values_RD = reference.embedding_RD.double().numpy()
    mean_D, std_D = values_RD.mean(0), values_RD.std(0)
    model = LogisticRegression(C=1.0, max_iter=2000).fit((values_RD - mean_D) / std_D, reference.label_R.numpy())
    expected = model.predict((query_ND.double().numpy() - mean_D) / std_D)
    assert few.probe(query_ND).tolist() == expected.tolist()


def _joined(rendezvous: Path, rank: int) -> tuple[list[list[float]], list[int], list[bool]]:
    """Of two ranks, whose shards have 3 and 2 images, one of them without a label."""
    rows = range(3) if rank == 0 else range(3, 5)
    images = ReferenceImages()
    targets = {"label": np.array([-1 if row == 1 else row % 2 for row in rows], np.int32)}
    images.add(torch.tensor([[float(row), -float(row)] for row in rows]), targets, [f"a/{row}" for row in rows])
    with group(rendezvous, rank) as distributed:
        reference = images.of_all_ranks(distributed, 2, fits_probe=True, where="shards")
    return reference.embedding_RD.tolist(), reference.label_R.tolist(), reference.is_held_out_R.tolist()


@pytest.mark.long
def test_the_reference_has_the_labelled_images_of_all_ranks(tmp_path: Path) -> None:
    embeddings, labels, held_out = run_two_ranks(_joined, tmp_path)
    assert embeddings == [[0, 0], [2, -2], [3, -3], [4, -4]]
    assert labels == [0, 0, 1, 0]
    keys_N2 = sample_keys(0, [f"a/{row}" for row in (0, 2, 3, 4)])
    assert held_out == [int(key) % 5 == 0 for key in keys_N2[:, 1]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """120 digits with labels as reference, of which each 7th has none, and 40 others to evaluate on."""
    folder, samples = tmp_path_factory.mktemp("shards"), list(digit_samples(160))
    for row in range(0, 120, 7):
        key, members = samples[row]
        samples[row] = key, {"png": members["png"]}
    return {
        "reference": pack_shards(samples[:120], f"{folder}/reference-%d.tar", shard_size=50),
        "val": pack_shards(samples[120:], f"{folder}/val-%d.tar", shard_size=40),
    }


def train(base: Config, folder: Path, shards: dict[str, list[str]], *, cached_label: str | None) -> Config:
    """A run of two epochs on a cache that reads these labels, without a teacher in its evaluations."""
    url, views = f"{folder}/cache", {"kind": "crop", "count": 1}
    config = embedding_config(base, cache={"url": url}, views=views, data={"label": cached_label})
    build(config)
    config = run_config(
        config,
        folder / "run",
        loss=[{"name": "cosine"}],
        student={"model": "python:tests.pipeline.student.small_networks:normalised"},
        data={"label": "cls", "val_shards": shards["val"]},
        train={"lr": 0.01, "eval_reference": shards["reference"]},
    )
    run(config)
    return config


@pytest.fixture(scope="module")
def trained(built_cache: TinyCache, shards: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Only read."""
    return train(built_cache.config, tmp_path_factory.mktemp("run"), shards, cached_label="cls")


def url_of(config: Config) -> str:
    assert config.run is not None
    return config.run.url


def hits_of_neighbours(config: Config, shards: dict[str, list[str]]) -> float:
    """The share of validation images that their neighbours classify correctly, embedded one by one."""
    student = load_run(url_of(config), "last").student
    embeddings: dict[str, tuple[Tensor, Tensor]] = {}
    for name, urls in shards.items():
        of_shards = config.model_copy(update={"data": config.data.model_copy(update={"shards": tuple(urls)})})
        embeddings[name] = one_by_one(of_shards, student.module, student.input, output="embedding")
    embedding_RD, label_R = embeddings["reference"]
    labelled_R = label_R >= 0
    assert int(labelled_R.sum()) == 120 - 18
    no_split = torch.zeros(int(labelled_R.sum()), dtype=torch.bool)
    reference = Reference(embedding_RD[labelled_R], label_R[labelled_R], no_split, fits_probe=True)
    query_ND, label_N = embeddings["val"]
    return (reference.knn(query_ND) == label_N).double().mean().item()


def evaluated_with_reference(config: Config, shards: dict[str, list[str]]) -> Evaluation:
    return evaluate_run(
        url_of(config),
        tuple(shards["val"]),
        checkpoint_name="last",
        num_threads=1,
        device=CPU,
        reference=tuple(shards["reference"]),
    )


def test_a_run_measures_neighbours_in_each_evaluation_and_the_probe_in_the_last(
    trained: Config, shards: dict[str, list[str]]
) -> None:
    first, last = evaluations(Path(url_of(trained)))
    assert first["probe_top1"] is None
    assert (first["cosine"], last["cosine"]) == (None, None)
    best = max((first, last), key=lambda line: line["knn_top1"])
    assert state_of(url_of(trained), "checkpoints/best.pt")["best"] == {"metric": "knn_top1", "value": best["knn_top1"]}
    assert summary_of(url_of(trained))["probe_top1"] == last["probe_top1"]

    hits = hits_of_neighbours(trained, shards)
    assert last["knn_top1"] == pytest.approx(hits, abs=1e-9)
    evaluation = evaluated_with_reference(trained, shards)
    assert {key: last[key] for key in ("knn_top1", "probe_top1")} == {
        key: evaluation.metrics[key] for key in ("knn_top1", "probe_top1")
    }
    assert evaluation.metrics["cosine"] is not None
    assert evaluation.images is not None
    assert np.nanmean(evaluation.images["knn_top1"].to_numpy()) == pytest.approx(hits)


def test_a_student_of_a_cache_without_labels_is_evaluated_with_those_of_other_shards(
    trained: Config, built_cache: TinyCache, shards: dict[str, list[str]], tmp_path: Path
) -> None:
    config = train(built_cache.config, tmp_path, shards, cached_label=None)
    assert evaluations(tmp_path / "run") == evaluations(Path(url_of(trained)))
    metrics = evaluated_with_reference(config, shards).metrics
    assert metrics == evaluated_with_reference(trained, shards).metrics
    assert metrics["knn_top1"] is not None


def test_an_evaluation_that_measures_nothing_is_warned_of(trained: Config, tmp_path: Path) -> None:
    tree = json.loads(trained.model_dump_json(exclude_unset=True))
    del tree["train"]["eval_reference"]
    config = Config.model_validate({**tree, "run": {"url": str(tmp_path / "run")}})
    (text,) = [text for text in warnings_of(config) if text.startswith("validation:")]
    assert "train.eval_reference" in text
    assert evaluations(tmp_path / "run")[-1]["knn_top1"] is None


def test_a_reference_that_cannot_be_used_is_refused(
    trained: Config, shards: dict[str, list[str]], tmp_path: Path
) -> None:
    def changed(**sections: Any) -> Config:
        tree = json.loads(trained.model_dump_json(exclude_unset=True)) | {"run": {"url": str(tmp_path / "run")}}
        for section, keys in sections.items():
            tree[section] = {**tree[section], **keys} if isinstance(keys, dict) else keys
        return Config.model_validate(tree)

    with raises("evaluate.reference-overlap", ConfigError, where="train.eval_reference"):
        check_training(changed(train={"eval_reference": shards["val"]}))
    with raises("config.reference-without-validation", ConfigError):
        check_training(changed(data={"val_shards": None}))
    plain = pack_shards(
        ((key, {"png": members["png"]}) for key, members in digit_samples(5)), f"{tmp_path}/plain-%d.tar", shard_size=5
    )
    with raises("evaluate.reference-classes", ConfigError, where="train.eval_reference"):
        run(changed(train={"eval_reference": plain}))
    with raises("evaluate.reference-unused", ConfigError, where="train.eval_reference"):
        check_training(
            changed(
                data={**HEADS, "cache": None, "shards": shards["reference"]},
                teacher={"mode": "none"},
                loss=[{"name": "ce"}],
                views={"kind": "crop", "size": 16},
            )
        )


def test_the_embedding_of_a_classifier_is_measured_too(
    built_cache: TinyCache, shards: dict[str, list[str]], tmp_path: Path
) -> None:
    config = run_config(
        built_cache.config,
        tmp_path / "run",
        data={"val_shards": shards["val"], "missing_labels": "ignore"},
        train={"lr": 0.01, "eval_reference": shards["reference"]},
    )
    run(config)
    last = evaluations(tmp_path / "run")[-1]
    assert last["knn_top1"] == pytest.approx(hits_of_neighbours(config, shards), abs=1e-9)
    assert last["probe_top1"] > 1 / 10
    assert last["top1"] not in (None, last["knn_top1"])
    evaluation = evaluated_with_reference(config, shards)
    # A table that compares it with students of task embedding has it too.
    assert [evaluation.value_of(metric) for metric in (KNN, PROBE)] == [last["knn_top1"], last["probe_top1"]]
