"""The weights of a teacher have no default, and random weights give a warning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.build_cache import build_cache
from jobs.plan_cache import report
from pipeline.cache.build.context import prepare
from pipeline.core.errors import ConfigError, ModelError
from pipeline.models import load_model, random_weights_warnings
from pipeline.models.cifar import resnet
from pipeline.student.training.config_checks import check_config, check_distillation, check_training, training_of
from pipeline.student.training.trainer import train
from schemas.config import Config, StudentConfig, TeacherConfig
from tests.errors import raises
from tests.pipeline.caches import TinyCache
from tests.pipeline.conftest import TinyConfig
from tests.pipeline.student.runs import KD, run_config, warnings_of

NETWORK: dict[str, Any] = {
    "model": "python:pipeline.models.cifar:resnet",
    "kwargs": {"depth": 8, "widths": [4, 4, 6, 7]},
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}


@contextmanager
def missing(where: str = "teacher.weights") -> Iterator[None]:
    with raises("config.teacher-weights-missing", ConfigError, where=where, exit_code=2) as caught:
        yield
    for choice in ("pretrained", "URL", "random"):
        assert choice in str(caught.value.expected)
    assert f"{where}=pretrained" in str(caught.value.next_step)


def test_a_build_without_weights_is_refused_before_it_writes(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = tiny_config(teacher={"weights": None})
    for begin in (prepare, build_cache, lambda config: report(config, measured=False)):
        with missing():
            begin(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("teacher", "where"),
    [
        ({"weights": None}, "teacher.weights"),
        ({"weights": "random", "others": [NETWORK]}, "teacher.others.0.weights"),
    ],
)
def test_an_online_teacher_without_weights_is_refused_by_the_config_alone(
    teacher: dict[str, Any], where: str, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    with missing(where):
        check_config(run_config(tiny_config(), tmp_path, mode="online", loss=KD, teacher=teacher))


def test_a_distillation_that_builds_a_cache_needs_weights(tiny_config: TinyConfig, tmp_path: Path) -> None:
    base = tiny_config(teacher={"weights": None})
    config = run_config(base, tmp_path / "run", loss=KD, cache={"url": str(tmp_path / "cache")})
    with missing():
        check_distillation(training_of(config))


def test_a_finished_cache_does_not_need_weights_of_the_teacher(built_cache: TinyCache, tmp_path: Path) -> None:
    config = run_config(built_cache.config, tmp_path / "run", loss=KD, teacher={"weights": None}, train={"epochs": 1})
    check_training(config)
    assert train(config)["steps"] == 5


def test_only_a_student_has_random_weights_by_default() -> None:
    student = load_model(StudentConfig.model_validate(NETWORK), widths={"logits": 10}, size=16, where="student")
    assert student.input.size == 16
    with missing():
        load_model(TeacherConfig.model_validate(NETWORK), widths={"logits": 10}, size=16)


def test_plan_build_and_training_warn_of_random_weights(
    tiny_config: TinyConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config()
    warnings = [warning for warning in report(config, measured=False).warnings if "weights is random" in warning]
    assert len(warnings) == 1
    build_cache(config)
    assert [record.levelname for record in caplog.records if "teacher.weights is random" in record.getMessage()] == [
        "WARNING"
    ]
    texts = warnings_of(run_config(config, tmp_path / "run", loss=KD, train={"epochs": 1}))
    assert sum("teacher.weights is random" in text for text in texts) == 1


def test_there_is_no_warning_without_a_teacher_or_with_weights_from_a_file() -> None:
    def warnings(teacher: dict[str, Any]) -> list[str]:
        return random_weights_warnings(Config.model_validate({"teacher": teacher}).teacher.models)

    assert warnings({}) == warnings({"weights": "random"}) == warnings({**NETWORK, "weights": "a.pt"}) == []
    others = {**NETWORK, "weights": "a.pt", "others": [{**NETWORK, "weights": "random"}]}
    assert [text.partition(" ")[0] for text in warnings(others)] == ["teacher.others.0.weights"]
    # The factory may load weights, which its config does not show.
    assert "untrained unless" in warnings({**NETWORK, "weights": "random"})[0]


def test_a_backbone_without_a_classifier_is_refused_as_a_teacher(tmp_path: Path) -> None:
    state = resnet(num_classes=10, depth=8, widths=(4, 4, 6, 7)).state_dict()
    backbone = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    torch.save(backbone, tmp_path / "backbone.pt")
    config = TeacherConfig.model_validate({**NETWORK, "weights": str(tmp_path / "backbone.pt")})
    with raises("model.untrained-head", ModelError, got="no fc.bias, fc.weight"):
        load_model(config, widths={"logits": 10}, size=16)
    # Weights of another network have another code.
    torch.save({"fc.weight": state["fc.weight"]}, tmp_path / "head.pt")
    with raises("weights.misfit", ModelError):
        load_model(config.model_copy(update={"weights": str(tmp_path / "head.pt")}), widths={"logits": 10}, size=16)


@pytest.mark.parametrize("model", ["timm/vit_small_patch14_dinov2", "timm/vit_base_patch16_siglip_224"])
def test_a_pretrained_teacher_without_a_classifier_is_refused_before_the_download(model: str) -> None:
    config = TeacherConfig.model_validate({"model": model, "weights": "pretrained"})
    with raises("model.untrained-head", ModelError) as caught:
        load_model(config, widths={"logits": 10}, size=None)
    assert "no head" in str(caught.value.got)
