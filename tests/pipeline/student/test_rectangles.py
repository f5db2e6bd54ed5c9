"""Inputs with another height than width: cached as online, verified, trained, evaluated and exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache.ops.inspect import inspect_cache
from pipeline.cache.verify import verify_cache
from pipeline.models.feature_maps import find_maps
from pipeline.models.load import load_model
from pipeline.student.data.batch import InputSize
from pipeline.student.data.loader import batch_bytes
from pipeline.student.export.exporters import export_run
from pipeline.student.training.trainer import train
from schemas.config import StudentConfig
from tests.errors import raises
from tests.pipeline.caches import TinyCache, build, cache_section
from tests.pipeline.conftest import tiny_config_of
from tests.pipeline.student.data.test_dataset import assert_same, load
from tests.pipeline.student.runs import (
    CE,
    KD,
    SMALL,
    cached_source,
    dataset,
    evaluated,
    indexed_source,
    losses,
    run,
    run_config,
    training_error,
)

SIZE, NUM_VIEWS, STEPS_AN_EPOCH = (12, 20), 2, 5
PLANS: dict[str, dict[str, Any]] = {
    "crop": {"kind": "crop", "randaugment": {"magnitude": 20}, "erasing": {"probability": 1.0}},
    "raw": {"kind": "function_matching", "pixels": "raw"},
    "jpeg": {"kind": "crop", "pixels": "jpeg:90"},
    "eval": {"kind": "eval", "count": 1},
    "scale_crop": {
        "kind": "scale_crop",
        "area": [0.05, 1.0],
        "scale": [0.2, 1.0],
        "eval_box": "letterbox",
        "jitter": {},
        "fill": [9, 8, 7],
    },
    "scale_crop, jpeg": {
        "kind": "scale_crop",
        "area": [0.05, 1.0],
        "scale": [0.5, 2.0, 0.5],
        "relative_to": "size",
        "pixels": "jpeg:90",
    },
    "letterbox": {"kind": "eval", "count": 1, "eval_box": "letterbox"},
}
Rectangles = Callable[[str], TinyCache]


@pytest.fixture(scope="module")
def rectangles(digits_shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> Rectangles:
    """``rectangles("crop")``: a cache of one of the plans, of a teacher with inputs of 12 x 20 pixels."""
    built: dict[str, TinyCache] = {}

    def get(name: str) -> TinyCache:
        if name not in built:
            views = {"count": NUM_VIEWS, "size": [*SIZE], **PLANS[name]}
            config = tiny_config_of(digits_shards, str(tmp_path_factory.mktemp("rectangles") / name), {"views": views})
            build(config)
            built[name] = TinyCache(cache_section(config).url, config)
        return built[name]

    return get


@pytest.mark.parametrize("name", PLANS)
def test_parity_of_pixels_cached_and_online(rectangles: Rectangles, tmp_path: Path, name: str) -> None:
    cache = rectangles(name)
    plan, steps = cache.config.views, range(cache.config.views.count * STEPS_AN_EPOCH)
    student, changed = InputSize(SIZE, "bilinear"), InputSize((24, 10), "bicubic")
    cached = load(dataset(cached_source(cache), plan, student=student), steps)
    others: dict[str, Any] = {} if plan.pixels != "none" else {"teachers": [changed]}
    online = load(dataset(indexed_source(cache.config, tmp_path), plan, student=student, **others), steps)
    assert_same(
        [replace(batch, teacher_outputs=(), teacher_pixels={}) for batch in cached],
        [replace(batch, teacher_pixels={}) for batch in online],
    )
    assert {batch.pixels_BCHW.shape[1:] for batch in cached} == {(3, *SIZE)}
    assert all(batch.teacher_pixels[changed].shape[1:] == (3, 24, 10) for batch in online if others)


def test_inspect_names_kind_and_options(rectangles: Rectangles) -> None:
    names = {name: inspect_cache(rectangles(name).url).views for name in ("scale_crop", "crop")}
    assert names == {
        "scale_crop": "scale_crop, jitter, letterbox, seed 0, 12×20 px",
        "crop": "crop, randaugment, erasing, seed 0, 12×20 px",
    }


def test_loader_processes_need_the_memory_of_rectangles(rectangles: Rectangles) -> None:
    cache = rectangles("crop")
    batches = dataset(cached_source(cache), cache.config.views, student=InputSize(SIZE, "bilinear"))
    squares = dataset(cached_source(cache), cache.config.views, student=InputSize(12, "bilinear"))
    # Batches of 8 rows.
    assert batch_bytes(batches) - batch_bytes(squares) == 8 * 3 * 12 * (20 - 12)
    assert_same(load(batches, range(2), num_workers=1), load(batches, range(2)))


@pytest.mark.parametrize("name", PLANS)
def test_verify_replays_views_and_eval_pass(rectangles: Rectangles, name: str) -> None:
    report = verify_cache(rectangles(name).url, threads=1)
    assert (report.problems, dict(report.not_checked)) == ([], {})
    assert report.checked["canaries"] >= 2 * (rectangles(name).config.views.count + 1)


@pytest.mark.parametrize(
    ("name", "size"),
    [("crop", None), ("eval", None), ("crop", [16, 8]), ("crop", 16), ("scale_crop", [24, 40]), ("letterbox", None)],
)
def test_parity_of_a_training_and_its_evaluation(
    rectangles: Rectangles, tmp_path: Path, name: str, size: list[int] | int | None
) -> None:
    base = rectangles(name).config
    keys: dict[str, Any] = {
        "data": {"val_shards": base.data.shards},
        "student": {**SMALL, "size": size},
        "loss": [*CE, *KD],
    }
    cached, online = (run_config(base, tmp_path / mode, mode=mode, **keys) for mode in ("cache", "online"))
    for config in (cached, online):
        run(config)
    error = training_error(online, len(losses(tmp_path / "cache")))
    assert losses(tmp_path / "cache") == pytest.approx(losses(tmp_path / "online"), rel=error)
    assert evaluated(cached).num_rows == 35
    if name == "crop" and size is None:
        done = export_run(str(tmp_path / "cache"), str(tmp_path / "student.onnx"))
        assert done.input.endswith("[N,3,12,20]")


def test_a_training_on_labels_alone(rectangles: Rectangles, tmp_path: Path) -> None:
    base = rectangles("eval").config
    config = run_config(base, tmp_path / "run", mode="none", student=SMALL, loss=CE, train={"epochs": 1})
    run(config)
    export_run(str(tmp_path / "run"), str(tmp_path / "student.safetensors"))
    assert json.loads(metadata(tmp_path / "student.safetensors")["size"]) == [*SIZE]


def metadata(path: Path) -> dict[str, str]:
    length = int.from_bytes(path.read_bytes()[:8], "little")
    return json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]


def test_a_config_may_not_name_another_rectangle_than_the_cache(rectangles: Rectangles, tmp_path: Path) -> None:
    cache = rectangles("eval")
    config = run_config(cache.config, tmp_path / "run", views={"kind": "eval", "size": [20, 12]})
    with raises("cache.other-views"):
        train(config)


def test_feature_maps_of_rectangles_are_refused() -> None:
    section = StudentConfig.model_validate(SMALL)
    loaded = load_model(section, widths={"logits": 10}, size=SIZE, where="student")
    with raises("model.maps-need-square"):
        find_maps(loaded.module, ["conv1"], size=SIZE, where="student_layers")
    assert find_maps(loaded.module, ["conv1"], size=12, where="student_layers")[0].side == 6
