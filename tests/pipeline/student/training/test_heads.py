"""Trainings on several heads: bound to their logits and labels, replayed, resumed and exported."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pipeline.student.cached_dataset import CachedDataset
from pipeline.student.evaluation.loaded_run import load_run
from pipeline.student.export.exporters import export_run
from pipeline.student.training.config_checks import check_config, check_plan, check_training
from schemas.config import Config
from tests.errors import raises
from tests.pipeline.caches import TinyCache, cache_section
from tests.pipeline.heads import build_heads, document_of, heads_config
from tests.pipeline.student.runs import check_resume, evaluated, evaluations, metrics, run, run_config, training_error
from tests.tolerances import ulps

STUDENT = {"model": "python:tests.pipeline.student.small_networks:normalised", "mean": [0.5] * 3, "std": [0.5] * 3}
EVERY_LOSS = [
    {"name": "ce"},
    {"name": "kd"},
    {"name": "bce", "label_smoothing": 0.1},
    {"name": "dist", "heads": ["pair", "tags"]},
    {"name": "dkd", "heads": ["pair"]},
    {"name": "hard", "heads": ["pair", "even"]},
    {"name": "nd"},
]


@pytest.fixture(scope="module")
def cache(built_cache: TinyCache, tmp_path_factory: pytest.TempPathFactory) -> TinyCache:
    """Of four mixed views of 30 images, in fp32. Never written to."""
    folder = tmp_path_factory.mktemp("heads")
    return build_heads(heads_config(built_cache.config, folder, views={"kind": "function_matching", "count": 4}))


def config_of(cache: TinyCache, url: Path, *, mode: str = "cache", **sections: Any) -> Config:
    keys: dict[str, Any] = {"student": STUDENT, "loss": EVERY_LOSS, **sections}
    return run_config(
        cache.config, url, mode=mode, **{**keys, "data": {"missing_labels": "ignore", **keys.get("data", {})}}
    )


def test_parity_every_loss_of_a_cached_run_is_that_of_an_online_run(cache: TinyCache, tmp_path: Path) -> None:
    train = {"epochs": 4, "lr": 0.01}
    run(config_of(cache, tmp_path / "cache", train=train))
    config = config_of(cache, tmp_path / "online", mode="online", train=train, teacher={"class_means": cache.url})
    run(config)
    pairs = list(zip(metrics(tmp_path / "cache"), metrics(tmp_path / "online"), strict=True))
    assert len(pairs) == 16
    for cached, online in pairs:
        names = [f"{loss}/{head}" for loss in ("ce", "kd", "hard", "nd") for head in ("even", "pair")]
        assert {f"loss/{name}" for name in ("bce", "dkd", "kd/tags", "dist/tags", *names)} < cached.keys()
        # A KL is a difference of rounded logarithms, here times T² = 16; near 0 its relative error has no bound.
        error = training_error(config, cached["step"] + 1)
        assert cached == pytest.approx(online, rel=error, abs=16 * 2 * ulps(11 + 12))


def test_a_row_may_lack_only_the_labels_that_no_loss_reads(cache: TinyCache, tmp_path: Path) -> None:
    refuse = {"missing_labels": "refuse"}
    run(config_of(cache, tmp_path / "even", loss=[{"name": "ce", "heads": ["even"]}], data=refuse))
    with raises("data.missing-labels") as caught:
        run(config_of(cache, tmp_path / "pair", loss=[{"name": "ce"}], data=refuse))
    # Every head is counted, and ``even`` lacks none.
    assert re.search(r"without a label \(label_even 0, label_pair [1-9]\d*\)$", str(caught.value.got))


@pytest.mark.parametrize(
    ("loss", "code", "fields"),
    [
        ({"name": "kd", "heads": ["pair", "color"]}, "loss.unknown-head", {"where": "loss.0.heads", "got": "color"}),
        ({"name": "ce", "heads": ["tags"]}, "loss.other-kind-of-head", {"got": "tags (multilabel)"}),
    ],
)
def test_heads_that_a_loss_cannot_take_are_refused(
    cache: TinyCache, tmp_path: Path, loss: dict[str, Any], code: str, fields: dict[str, str]
) -> None:
    for mode in ("cache", "online"):
        with raises(code, **fields):
            check_training(config_of(cache, tmp_path, mode=mode, loss=[loss]))


def test_a_run_measures_the_heads_that_it_trains_and_resumes_bitwise(cache: TinyCache, tmp_path: Path) -> None:
    val_shards = {"val_shards": cache.config.data.shards}

    of_classes = [{"name": "ce"}, {"name": "kd", "heads": ["even", "pair"]}]

    def config(url: Path) -> Config:
        data = {**val_shards, "missing_labels": "ignore"}
        return config_of(cache, url, loss=of_classes, data=data, train={"epochs": 3})

    run(config(tmp_path / "run"))
    evaluation = evaluated(config(tmp_path / "run"))
    assert evaluation.untrained == ["logits.tags"]
    assert evaluation.metrics["tags/map"] is None
    (*_, last) = evaluations(tmp_path / "run")
    for key in ("even/top1", "pair/top1", "pair/balanced_accuracy"):
        assert evaluation.metrics[key] == last[key]
    assert load_run(str(tmp_path / "run"), "best").untrained == {"logits.tags"}
    check_resume(config, tmp_path, stop=("eval", 2), first_step=8)


def test_a_head_that_the_weights_lack_and_no_loss_reads_is_not_trained(cache: TinyCache, tmp_path: Path) -> None:
    kd_pair = [{"name": "kd", "heads": ["pair"]}]
    run(config_of(cache, tmp_path / "first", loss=kd_pair))
    export_run(str(tmp_path / "first"), f"{tmp_path}/pair.safetensors", checkpoint_name="last")
    student = {**STUDENT, "weights": f"{tmp_path}/pair.safetensors"}
    run(config_of(cache, tmp_path / "second", student=student, loss=[{"name": "ce", "heads": ["even"]}]))
    assert load_run(str(tmp_path / "first"), "last").untrained == {"logits.even", "logits.tags"}
    # The file has the head pair.
    assert load_run(str(tmp_path / "second"), "last").untrained == {"logits.tags"}


def test_teachers_may_have_one_head_each(cache: TinyCache, tmp_path: Path) -> None:
    """Each term is summed over the teachers that have its head; the rest of the training is that of one cache."""
    even, pair = (
        build_heads(with_heads(cache.config, f"{tmp_path}/{name}", heads=heads, depth=depth))
        for name, heads, depth in (("even", ["even"], 8), ("pair", ["pair", "tags"], 14))
    )
    loss = [{"name": "kd", "heads": ["even", "pair"], "temperature": 1.0}]
    run(config_of(cache, tmp_path / "both", loss=loss, data={"cache": [even.url, pair.url]}, teacher={"model": None}))
    # Before the first update all runs have the same student.
    for name, opened in (("even", even), ("pair", pair)):
        one_head, data = [{**loss[0], "heads": [name]}], {"cache": opened.url}
        run(config_of(cache, tmp_path / f"run-{name}", loss=one_head, data=data, teacher={"model": None}))
        alone, both = metrics(tmp_path / f"run-{name}")[0]["loss/kd"], metrics(tmp_path / "both")[0][f"loss/kd/{name}"]
        assert alone == pytest.approx(both, rel=1e-6)


@pytest.mark.parametrize("mode", ["cache", "online"])
def test_a_head_that_no_teacher_has_is_refused(cache: TinyCache, tmp_path: Path, mode: str) -> None:
    """By the plan of a cache, and by a training with an online teacher."""
    config = config_of(cache, tmp_path, mode=mode, loss=[{"name": "kd"}], teacher={"heads": ["pair"]})
    with raises("loss.teacher-lacks-head", got="no logits.even"):
        check_plan(config.model_copy(update={"cache": cache.config.cache})) if mode == "cache" else check_config(config)


def with_heads(base: Config, url: str, *, heads: list[str], depth: int) -> Config:
    teacher = base.teacher.model_copy(update={"heads": tuple(heads), "kwargs": {**base.teacher.kwargs, "depth": depth}})
    return base.model_copy(update={"teacher": teacher, "cache": cache_section(base).model_copy(update={"url": url})})


def test_a_cached_dataset_has_labels_logits_and_means_by_head(cache: TinyCache) -> None:
    with closing(CachedDataset(cache.url, global_batch_size=8, tail="short")) as dataset:
        batch = dataset[0]
        rows = [int(sample_id[-4:]) for sample_id in batch.sample_ids]
        documents = [document_of(row) for row in rows]
        assert batch.labels("pair").tolist() == [document.get("pair", -1) for document in documents]
        tags = batch.labels("tags").tolist()
        assert [[k for k in range(11) if row[k] == 1] for row in tags] == [sorted(d["tags"] or []) for d in documents]
        assert batch.teacher_logits(head="tags").shape == (8, 11)
        assert dataset.class_means(head="pair").shape == (10, 7)
        for request in (lambda: batch.labels_B, lambda: batch.labels("color"), batch.teacher_logits):
            with raises("data.no-such-head", expected="one of even, pair, tags"):
                request()
