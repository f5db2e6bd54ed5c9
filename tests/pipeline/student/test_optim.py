"""Optimiser and schedule against hand numbers and torch's own schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from pipeline.errors import ConfigError
from pipeline.student.optim import lr_factor, make_optimizer, make_schedule
from schemas.config import TrainConfig


def train(**keys: Any) -> TrainConfig:
    return TrainConfig.model_validate({"lr": 0.2, **keys})


def rates(config: TrainConfig, total_steps: int) -> list[float]:
    """The learning rate of each step, as a training would meet them."""
    optimizer = make_optimizer(nn.Linear(2, 2), config)
    schedule = make_schedule(optimizer, config, total_steps=total_steps)
    found: list[float] = []
    for _ in range(total_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_warm_up_is_linear_and_reaches_the_peak_in_its_last_step() -> None:
    config = train(warmup_steps=4, schedule="constant")
    assert rates(config, 6) == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2])


def test_cosine_without_warm_up_is_torchs() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    schedule = CosineAnnealingLR(optimizer, T_max=10)
    wanted: list[float] = []
    for _ in range(10):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates(train(schedule="cosine"), 10) == pytest.approx(wanted)


def test_cosine_ends_at_zero_and_stays_there() -> None:
    config = train(schedule="cosine", warmup_steps=2)
    factors = [lr_factor(step, train=config, total_steps=10) for step in (2, 6, 10, 11)]
    assert factors == pytest.approx([1.0, 0.5, 0.0, 0.0])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weight_decay_is_for_kernels_alone(name: str) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    frozen = nn.Linear(2, 2).requires_grad_(False)
    optimizer = make_optimizer(nn.ModuleList([module, frozen]), train(optimizer=name, weight_decay=0.3))
    decay = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert {name: decay[id(parameter)] for name, parameter in module.named_parameters()} == {
        "0.weight": 0.3,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "3.weight": 0.3,
        "3.bias": 0.0,
    }
    assert len(decay) == 6


def test_one_step_of_sgd_is_the_hand_number() -> None:
    layer = nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(2.0)
        layer.bias.fill_(1.0)
    optimizer = make_optimizer(layer, train(optimizer="sgd", momentum=0.0, weight_decay=0.5))
    layer(torch.tensor([[3.0]])).sum().backward()
    optimizer.step()
    # 2 - 0.2 (3 + 0.5 * 2) and 1 - 0.2: no decay on the bias.
    assert (layer.weight.item(), layer.bias.item()) == pytest.approx((1.2, 0.8))


def test_a_warm_up_as_long_as_the_training_is_refused() -> None:
    config = train(warmup_steps=12)
    optimizer = make_optimizer(nn.Linear(2, 2), config)
    with pytest.raises(ConfigError, match="warm-up"):
        make_schedule(optimizer, config, total_steps=12)
    make_schedule(optimizer, config, total_steps=13)
