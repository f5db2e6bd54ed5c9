"""A cache has one teacher and one plan: a builder that differs stops before it writes, and names the difference."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pipeline import storage
from pipeline.cache.build.context import prepare
from pipeline.cache.build.header_claim import claim, make_header
from pipeline.cache.format import header, layout
from pipeline.cache.format.header import read_header, views_id
from pipeline.core.errors import CacheError, ModelError
from pipeline.core.hashing import seal
from pipeline.models.cifar import resnet
from pipeline.teacher.inference import load_teacher
from schemas.cache_format import Header
from schemas.config import Config, ViewsConfig
from tests.errors import raises
from tests.pipeline.cache import teachers
from tests.pipeline.caches import TinyCache, build, cache_section, files
from tests.pipeline.conftest import TinyConfig


def header_of(config: Config) -> Header:
    assert config.data.num_classes is not None
    teacher = load_teacher(
        config.teacher,
        widths={"logits": config.data.num_classes},
        size=config.views.size,
        device=torch.device("cpu"),
    )
    return make_header(teacher, plan=config.views, cache=cache_section(config), data=config.data)


def teacher_section(factory: str) -> dict[str, Any]:
    return {"model": f"python:tests.pipeline.cache.teachers:{factory}", "kwargs": {}}


def save_weights(path: Path, *, nudge: float) -> str:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = resnet(10, 8, (4, 4, 6, 7)).state_dict()
    state["fc.bias"][3] += nudge
    safetensors.torch.save_file(state, path)
    return str(path)


MEANINGFUL: list[dict[str, dict[str, Any]]] = [
    {"views": {"kind": "crop"}},
    {"views": {"seed": 1}},
    {"views": {"area": [0.3, 0.9]}},
    {"views": {"aspect": [0.8, 1.2]}},
    {"views": {"flip": 0.0}},
    {"views": {"crop_fraction": 1.0}},
    {"views": {"mix_group": 4}},
    {"views": {"jitter": {}}},
    {"views": {"randaugment": {}}},
    {"views": {"erasing": {}}},
    {"views": {"cutmix": 0.5}},
    {"views": {"size": 8}},
    {"teacher": {"kwargs": {"depth": 14, "widths": [4, 4, 6, 7]}}},
    {"teacher": {"mean": [0.5, 0.5, 0.5]}},
    {"teacher": {"std": [0.5, 0.5, 0.5]}},
    {"teacher": {"interpolation": "bicubic"}},
    {"teacher": {"precision": "bf16"}},
    {"cache": {"logits": "fp16"}},
    {"cache": {"embeddings": "none"}},
    {"cache": {"class_means": "none"}},
    {"data": {"num_classes": 11}},
]
MEANINGLESS: list[dict[str, dict[str, Any]]] = [
    {"views": {"count": 50}},
    {"teacher": {"batch_size": 3}},
    {"teacher": {"mode": "online"}},
    {"cache": {"url": "memory://elsewhere"}},
    {"cache": {"views_per_part": 1}},
    {"data": {"shards": "other-{0..3}.tar"}},
    {"data": {"bad_samples": "skip", "max_bad_share": 0.5}},
    {"ray": {"cpus_per_task": 2}},
    {"train": {"epochs": 3}},
]


def name_of(change: dict[str, dict[str, Any]] | bool) -> str:
    if isinstance(change, bool):
        return "changes" if change else "same"
    section, keys = next(iter(change.items()))
    return f"{section}.{next(iter(keys))}"


@pytest.mark.parametrize(
    ("change", "is_meaningful"),
    [*((change, True) for change in MEANINGFUL), *((change, False) for change in MEANINGLESS)],
    ids=name_of,
)
def test_the_fingerprint_changes_if_and_only_if_the_outputs_may(
    change: dict[str, Any], is_meaningful: bool, tiny_config: TinyConfig, built_cache: TinyCache
) -> None:
    fingerprint = read_header(built_cache.url).fingerprint
    assert (header_of(tiny_config(**change)).fingerprint != fingerprint) is is_meaningful


def test_the_fingerprint_depends_on_the_weights_and_not_on_their_url(tiny_config: TinyConfig, tmp_path: Path) -> None:
    first, equal, different = (
        header_of(tiny_config(teacher={"weights": save_weights(tmp_path / name, nudge=nudge)}))
        for name, nudge in (("a.safetensors", 0), ("b.safetensors", 0), ("c.safetensors", 1e-6))
    )
    assert first == equal
    assert first.fingerprint != different.fingerprint


def test_the_views_id_depends_on_the_plan_alone() -> None:
    plan = ViewsConfig.model_validate({"kind": "crop", "count": 3, "size": 16})
    assert views_id(plan) == views_id(plan.model_copy(update={"count": 9, "size": 224}))
    for change in ({"kind": "function_matching"}, {"seed": 1}, {"flip": 0.1}, {"mix_group": 2}, {"area": (0.1, 1.0)}):
        assert views_id(plan) != views_id(plan.model_copy(update=change))


def test_the_views_id_has_the_size_of_a_rectangle_where_boxes_depend_on_it() -> None:
    square, pair, wide, wider = (
        ViewsConfig.model_validate({"kind": "eval", "size": size}) for size in (16, [16, 16], [16, 32], [16, 48])
    )
    assert views_id(square) == views_id(pair) == views_id(ViewsConfig(kind="eval"))
    assert len({*map(views_id, (square, wide, wider))}) == 3
    crops = [plan.model_copy(update={"kind": "crop"}) for plan in (square, wide, wider)]
    assert len({*map(views_id, crops)}) == 1


def test_the_views_id_of_scaled_views_has_all_that_decides_their_boxes_and_their_padding() -> None:
    plan = {"kind": "scale_crop", "size": 16}
    changes: list[dict[str, Any]] = [
        *({"size": 32}, {"scale": [0.5, 1.0]}, {"scale": [0.5, 2.0, 0.5]}, {"relative_to": "size"}),
        *({"fill": [0, 0, 0]}, {"eval_box": "letterbox"}, {"seed": 1}),
    ]
    ids = [views_id(ViewsConfig.model_validate(plan | change)) for change in [{}, *changes]]
    assert len({*ids}) == len(ids)
    crops = [ViewsConfig.model_validate({"kind": "eval", "eval_box": box}) for box in ("centre", "letterbox")]
    assert views_id(crops[0]) == views_id(ViewsConfig(kind="eval")) != views_id(crops[1])


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"views": {"seed": 1}}, "views.seed: 0 -> 1"),
        ({"views": {"size": 8}}, "teacher.size: 16 -> 8"),
        ({"views": {"size": [8, 16]}}, "teacher.size: 16 -> [8, 16]"),
        ({"views": {"cutmix": 0.5}}, "views.cutmix: None -> 0.5"),
        ({"teacher": {"precision": "bf16"}}, "teacher.precision: fp32 -> bf16"),
        ({"cache": {"logits": "fp16"}}, "teacher.logits: fp32 -> fp16"),
        ({"data": {"max_pixels": 1000}}, "data.max_pixels: 64000000 -> 1000"),
        ({"data": {"image": "png"}}, "data.image"),
    ],
    ids=["plan", "size", "rectangle", "option", "precision", "encoding", "limit", "member"],
)
def test_a_builder_that_differs_stops_before_it_writes_and_names_the_difference(
    change: dict[str, Any], difference: str, tiny_cache: TinyCache, tiny_config: TinyConfig
) -> None:
    before = files(tiny_cache.url)
    with raises("cache.other-header", CacheError) as caught:
        build(tiny_config(**change))
    assert difference in str(caught.value.got)
    assert files(tiny_cache.url) == before


@pytest.mark.usefixtures("tiny_cache")
def test_other_weights_are_refused(tiny_config: TinyConfig, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"cache\.other-header[\s\S]*teacher\.weights: [0-9a-f]{64} -> [0-9a-f]{64}"):
        prepare(tiny_config(teacher={"weights": save_weights(tmp_path / "w.safetensors", nudge=1e-3)}))


@pytest.mark.parametrize(("scale", "is_refused"), [(1.1, True), (1 + 1e-5, False)], ids=["code", "rounding"])
def test_changed_code_with_the_same_weights_is_noticed_and_rounding_of_another_machine_is_not(
    scale: float, is_refused: bool, tiny_config: TinyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, url = tiny_config(teacher=teacher_section("Scaled")), str(tmp_path / "cache")
    before = claim(url, header_of(config))
    monkeypatch.setattr(teachers, "scale", scale)
    after = header_of(config)
    assert after.fingerprint == before.fingerprint
    with raises("cache.other-probe-logits", CacheError) if is_refused else nullcontext():
        assert claim(url, after) == before


def test_a_teacher_whose_outputs_are_nan_is_refused_before_any_work(tiny_config: TinyConfig) -> None:
    config = tiny_config(teacher=teacher_section("NanOnNoise"))
    with pytest.raises(ModelError, match=r"model\.not-finite"):
        prepare(config)
    assert not storage.exists(storage.join(cache_section(config).url, layout.HEADER))


def test_a_url_without_a_header_is_not_a_cache(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"cache\.missing\]"):
        read_header(str(tmp_path))


def test_a_header_of_another_format_is_refused(tiny_config: TinyConfig) -> None:
    body = header_of(tiny_config()).model_dump(mode="json")
    with pytest.raises(CacheError, match=r"cache\.unknown-format[\s\S]*got: +2"):
        header.parse_header(seal({**body, "format_version": 2}), where="here")
    with pytest.raises(CacheError, match=r"cache\.invalid-record[\s\S]*mood"):
        header.parse_header(seal({**body, "mood": "good"}), where="here")
    del body["outputs"]
    with pytest.raises(CacheError, match=r"cache\.invalid-record[\s\S]*outputs"):
        header.parse_header(seal(body), where="here")


def test_an_unknown_encoding_is_refused(tiny_config: TinyConfig) -> None:
    body = header_of(tiny_config()).model_dump(mode="json")
    body["outputs"][0]["encoding"] = "packed"
    with pytest.raises(CacheError, match=r"cache\.unknown-encoding[\s\S]*got: +packed"):
        header.parse_header(seal(body), where="here")


def test_an_unknown_output_is_ignored_in_any_encoding(tiny_config: TinyConfig) -> None:
    body = header_of(tiny_config()).model_dump(mode="json")
    body["outputs"].append({**body["outputs"][0], "name": "depth", "encoding": "packed"})
    assert header.parse_header(seal(body), where="here").outputs[-1].encoding == "packed"
