"""Values that a run takes from its caches instead of its config, and config keys that may not contradict them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open

from pipeline.student.evaluation.evaluator import evaluate_run
from pipeline.student.export.exporters import export_run
from pipeline.student.run import checkpoint
from pipeline.student.supervision.spec import resolve_spec
from pipeline.student.training.config_checks import check_distillation
from pipeline.student.training.trainer import train
from schemas.config import Config, StudentConfig
from tests.errors import raises
from tests.marks import slow
from tests.pipeline.caches import build, cache_section
from tests.pipeline.conftest import TinyConfig
from tests.pipeline.student.conftest import Replay
from tests.pipeline.student.runs import KD, SMALL, index_shards, metrics, run_config, training_error


def with_views(**views: Any) -> dict[str, Any]:
    return {**SMALL, "views": views}


@pytest.mark.parametrize("mode", ["cache", "online"])
def test_a_student_has_separate_views_only_where_the_config_sets_them(
    replays: Replay, tmp_path: Path, mode: str
) -> None:
    base = replays("crop").config
    same = resolve_spec(run_config(base, tmp_path, mode=mode))
    other = resolve_spec(run_config(base, tmp_path, mode=mode, student=with_views(kind="crop", seed=7)))
    assert same.student_views is None
    assert same.student_plan.seed == same.plan.seed == other.plan.seed == 0
    assert other.student_plan.seed == 7


@pytest.mark.parametrize(
    ("kind", "mode", "views", "reported"),
    [
        ("crop", "none", {"kind": "eval"}, "teacher.mode: none"),
        ("function_matching", "cache", {"kind": "crop", "seed": 1}, "a teacher with views of kind function_matching"),
        ("function_matching", "online", {"kind": "eval"}, "a teacher with views of kind function_matching"),
        ("crop", "cache", None, "the views of its teacher"),
        ("crop", "online", None, "the views of its teacher"),
    ],
)
def test_student_views_that_no_teacher_outputs_fit_are_refused(
    replays: Replay, tmp_path: Path, kind: str, mode: str, views: dict[str, Any] | None, reported: str
) -> None:
    base = replays(kind).config
    views = base.views.model_dump(exclude={"count", "size"}) if views is None else views
    config = run_config(base, tmp_path, mode=mode, student=with_views(**views))
    with raises("config.student-views") as caught:
        resolve_spec(config)
    assert caught.value.got == reported


def test_they_are_refused_before_a_cache_is_built(replays: Replay, tmp_path: Path) -> None:
    base = replays("function_matching").config
    url = str(tmp_path / "to-build")
    config = run_config(base, tmp_path / "run", data={"cache": url}, student=with_views(kind="eval"))
    config = config.model_copy(update={"cache": cache_section(base).model_copy(update={"url": url})})
    with raises("config.student-views"):
        check_distillation(config)


@pytest.mark.parametrize(
    ("views", "reported"),
    [
        ({"kind": "function_matching"}, "expected crop or eval"),
        ({"kind": "crop", "count": 3}, "views has count"),
        ({"kind": "crop", "size": 16, "count": 2}, "views has count, size"),
    ],
)
def test_keys_without_a_meaning_for_a_student_are_refused(views: dict[str, Any], reported: str) -> None:
    with pytest.raises(ValidationError, match=reported):
        StudentConfig.model_validate({"views": views})


def test_a_run_with_views_of_its_student_resumes_and_can_be_evaluated(replays: Replay, tmp_path: Path) -> None:
    config = run_config(replays("crop").config, tmp_path / "run", student=with_views(kind="crop", seed=1))
    summary = train(config)
    assert checkpoint.read_config(str(tmp_path / "run")) == config
    assert train(config) == summary


@pytest.mark.slow
@pytest.mark.parametrize("views", [{"kind": "eval"}, {"kind": "crop", "seed": 1}], ids=["eval", "independent"])
def test_parity_loss_of_a_cached_and_an_online_run_whose_student_has_separate_views(
    replays: Replay, tmp_path: Path, views: dict[str, Any]
) -> None:
    config = run_config(replays("crop").config, tmp_path / "cache", student=with_views(**views))
    train(config)
    config = run_config(replays("crop").config, tmp_path / "online", mode="online", student=with_views(**views))
    index_shards(config, tmp_path / "online" / "index")
    train(config)
    cached, online = ([record["loss"] for record in metrics(tmp_path / mode)] for mode in ("cache", "online"))
    assert len(cached) == 10
    assert cached == pytest.approx(online, rel=training_error(config, 10))


@pytest.mark.parametrize(
    "cached",
    [{"label": None, "num_classes": 7, "max_pixels": 1_000_000}, slow({"max_pixels": 1_000_000})],
    ids=str,
)
@pytest.mark.parametrize(
    "views", [{"kind": "eval", "count": 1}, slow({"kind": "crop", "seed": 3, "flip": 0.0})], ids=str
)
def test_a_run_that_leaves_everything_to_its_cache_can_be_evaluated_exported_and_resumed(
    cached: dict[str, Any], views: dict[str, Any], tiny_config: TinyConfig, tmp_path: Path
) -> None:
    base = tiny_config(data=cached, views=views, cache={"class_means": "none"})
    build(base)
    config = Config.model_validate(
        {
            "data": {"cache": cache_section(base).url},
            "student": SMALL,
            "loss": KD,
            "train": {"global_batch_size": 7},
            "run": {"url": str(tmp_path / "run")},
            "ray": {"address": "none"},
        }
    )
    summary = train(config)
    assert train(config) == summary
    assert base.data.shards is not None
    evaluation = evaluate_run(
        str(tmp_path / "run"), base.data.shards, checkpoint_name="last", num_threads=1, device=torch.device("cpu")
    )
    assert evaluation.num_rows == 35
    assert (evaluation.metrics["top1"] is None) == ("label" in cached)
    exported = export_run(str(tmp_path / "run"), str(tmp_path / "student.safetensors"))
    assert exported.step == summary["steps"]


def test_a_run_may_name_the_classes_of_a_cache_without_names(replays: Replay, tmp_path: Path) -> None:
    names = [f"digit {number}" for number in range(10)]
    base = replays("crop").config
    config = run_config(base, tmp_path, loss=[{"name": "ce"}], data={"classes": names, "val_shards": base.data.shards})
    assert config.run is not None
    assert base.data.shards is not None
    train(config)
    evaluation = evaluate_run(
        config.run.url, base.data.shards, checkpoint_name="last", num_threads=1, device=torch.device("cpu")
    )
    assert evaluation.class_names == {"recall": tuple(names)}
    exported = export_run(config.run.url, str(tmp_path / "student.safetensors"))
    with safe_open(exported.url, framework="pt") as file:
        assert json.loads(file.metadata()["classes"]) == names
