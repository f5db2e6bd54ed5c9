"""Frozen parts do not change, including BatchNorm statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.models import load_model
from pipeline.student.networks.freeze import freeze
from pipeline.student.networks.student import Student
from pipeline.student.training.config_checks import check_training
from pipeline.student.training.trainer import train
from schemas.config import StudentConfig
from tests.errors import raises
from tests.pipeline.student.conftest import Replay
from tests.pipeline.student.runs import CE, NORMALISED, run_config, state_of


def network(seed: int = 0) -> nn.Module:
    section = StudentConfig.model_validate(NORMALISED)
    return load_model(section, widths={"logits": 10}, size=16, seed=seed, where="student").module.network.train()


@pytest.mark.parametrize(
    ("names", "frozen"),
    [
        (["conv1"], {"conv1.0.weight", "conv1.0.bias", "conv1.1.weight", "conv1.1.bias"}),
        (["conv1.1", "fc.bias"], {"conv1.1.weight", "conv1.1.bias", "fc.bias"}),
        ([], set()),
    ],
    ids=lambda value: str(sorted(value)),
)
def test_a_name_freezes_everything_in_its_module_and_nothing_else(names: list[str], frozen: set[str]) -> None:
    module = network()
    freeze(module, names)
    assert {name for name, parameter in module.named_parameters() if not parameter.requires_grad} == frozen


@pytest.mark.parametrize(
    ("name", "near"), [("conv", "conv1"), ("conv1.2", "conv1.1"), ("fcc", "fc"), ("layer9.x", "conv1, conv2, fc")]
)
def test_an_unknown_name_is_refused_with_the_nearest_names(name: str, near: str) -> None:
    with raises("config.unknown-frozen-name", got=name) as caught:
        freeze(network(), [name])
    assert near in str(caught.value.expected)


def test_a_student_without_trained_parameters_is_refused() -> None:
    with raises("config.all-frozen"):
        freeze(network(), ["conv1", "conv2", "fc"])


def test_a_frozen_batchnorm_needs_no_second_row() -> None:
    section = StudentConfig.model_validate(NORMALISED)
    student = Student(
        load_model(section, widths={"logits": 10}, size=16, where="student").module, teacher_dims=[]
    ).train()
    assert student.min_rows == 2
    freeze(student.model.network, ["conv1"])
    assert student.min_rows == 1
    student(torch.rand(1, 3, 16, 16))


def test_only_frozen_parameters_are_bitwise_unchanged_after_a_training(replays: Replay, tmp_path: Path) -> None:
    """Also after an evaluation, which sets the student to evaluation mode and back; with decay and an average."""
    base = replays("crop").config
    keys: dict[str, Any] = {"epochs": 2, "freeze": ["conv1"], "weight_decay": 0.1, "ema": 0.9}
    train(run_config(base, tmp_path, loss=CE, student=NORMALISED, data={"val_shards": base.data.shards}, train=keys))
    first = network().state_dict()
    for name, value in state_of(tmp_path)["raw"].items():
        assert torch.equal(value, first[name]) == name.startswith("conv1."), name


def test_an_unknown_name_is_refused_before_training(replays: Replay, tmp_path: Path) -> None:
    config = run_config(replays("crop").config, tmp_path, train={"freeze": ["convv1"]})
    with raises("config.unknown-frozen-name", where="train.freeze"):
        check_training(config)
    assert not list(tmp_path.iterdir())
