"""Optimiser and schedule against values by hand and torch's own schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, PolynomialLR

from pipeline.student.training.optim import build_optimizer, build_schedule, lr_factor
from schemas.config import TrainConfig
from tests.errors import raises
from tests.tolerances import ulps


def train(**keys: Any) -> TrainConfig:
    return TrainConfig.model_validate({"lr": 0.2, **keys})


def learning_rates(optimizer: torch.optim.Optimizer, schedule: LRScheduler, num_steps: int) -> list[float]:
    """The learning rate of each step, as a training would use them."""
    used: list[float] = []
    for _ in range(num_steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return used


def rates(config: TrainConfig, total_steps: int) -> list[float]:
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    return learning_rates(optimizer, build_schedule(optimizer, config, total_steps=total_steps), total_steps)


def test_warm_up_is_linear_and_reaches_the_peak_in_its_last_step() -> None:
    config = train(warmup_steps=4, schedule="constant")
    assert rates(config, 6) == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2])


@pytest.mark.parametrize(
    ("keys", "torch_schedule"),
    [
        ({"schedule": "cosine"}, partial(CosineAnnealingLR, T_max=9)),
        ({"schedule": "step", "milestones": [3, 7], "gamma": 0.3}, partial(MultiStepLR, milestones=[3, 7], gamma=0.3)),
    ],
    ids=["cosine", "step"],
)
def test_a_schedule_without_warm_up_is_torchs(
    keys: dict[str, Any], torch_schedule: Callable[[torch.optim.Optimizer], LRScheduler]
) -> None:
    """Nine epochs of one step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    expected = learning_rates(optimizer, torch_schedule(optimizer), 9)
    assert rates(train(**keys, epochs=9), 9) == pytest.approx(expected)


def test_cosine_ends_at_zero_and_stays_there() -> None:
    config = train(schedule="cosine", warmup_steps=2)
    factors = [lr_factor(step, train=config, total_steps=10) for step in (2, 6, 10, 11)]
    assert factors == pytest.approx([1.0, 0.5, 0.0, 0.0])


def test_poly_is_torchs_and_ends_at_the_given_rate() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    expected = learning_rates(optimizer, PolynomialLR(optimizer, total_iters=9, power=0.9), 9)
    assert rates(train(schedule="poly", epochs=9), 9) == pytest.approx(expected)
    # By hand: three of four steps after the warm-up are left, then one.
    config = train(schedule="poly", power=2.0, end_lr=0.04, warmup_steps=2)
    factors = [lr_factor(step, train=config, total_steps=6) for step in (1, 2, 3, 5, 6, 7)]
    assert factors == pytest.approx([1.0, 1.0, 0.2 + 0.8 * 9 / 16, 0.2 + 0.8 / 16, 0.2, 0.2])


def test_a_step_schedule_decays_after_its_milestones_counted_from_the_start() -> None:
    """Five epochs of two steps."""
    config = train(schedule="step", milestones=[2, 4], gamma=0.1, epochs=5, warmup_steps=1)
    assert rates(config, 10) == pytest.approx([0.2] * 4 + [0.02] * 4 + [0.002] * 2)


def test_an_exponential_schedule_decays_in_stairs_of_any_length() -> None:
    """Six epochs of two steps; 1.5 epochs are three steps."""
    config = train(schedule="exponential", gamma=0.5, decay_epochs=1.5, epochs=6)
    assert rates(config, 12) == pytest.approx([0.2] * 3 + [0.1] * 3 + [0.05] * 3 + [0.025] * 3)


@pytest.mark.parametrize(
    ("keys", "reported"),
    [
        ({"schedule": "step"}, "schedule step needs milestones"),
        ({"schedule": "exponential"}, "schedule exponential needs decay_epochs"),
        ({"milestones": [3]}, "milestones is for schedule step, and the schedule is cosine"),
        ({"schedule": "step", "milestones": [3, 3]}, "ascending epochs"),
        ({"power": 2.0}, "power is for schedule poly, and the schedule is cosine"),
        ({"schedule": "step", "milestones": [3], "end_lr": 0.1}, "end_lr is for schedule poly"),
        ({"schedule": "poly", "end_lr": 0.3}, "end_lr is 0.3, above lr, which is 0.2"),
        ({"optimizer": "sgd", "betas": [0.9, 0.99]}, "betas is for adamw, lamb, soap, and the optimizer is sgd"),
        ({"optimizer": "adamw", "alpha": 0.9}, "alpha is for rmsprop_tf"),
        ({"optimizer": "sgd", "eps": 1e-3}, "eps is for"),
    ],
    ids=str,
)
def test_keys_that_an_optimizer_or_schedule_does_not_take_are_refused(keys: dict[str, Any], reported: str) -> None:
    with pytest.raises(ValidationError, match=reported):
        train(**keys)


def stepped(name: str, gradients: list[float], **keys: Any) -> list[float]:
    """A weight of 2 after each of these gradients."""
    weight = nn.Parameter(torch.full((1, 1), 2.0))
    layer = nn.Module()
    layer.register_parameter("weight", weight)
    optimizer = build_optimizer(layer, train(optimizer=name, **keys))
    found: list[float] = []
    for gradient in gradients:
        weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        found.append(weight.item())
    return found


def test_rmsprop_is_tensorflows() -> None:
    """By hand: the mean of squares begins at 1, eps is inside the root, decay is L2, lr is inside the momentum."""
    mean, momentum, weight = 1.0, 0.0, 2.0
    expected: list[float] = []
    for gradient in (3.0, -1.0, 0.5):
        gradient += 0.1 * weight
        mean = 0.8 * mean + 0.2 * gradient**2
        momentum = 0.7 * momentum + 0.2 * gradient / math.sqrt(mean + 0.01)
        weight -= momentum
        expected.append(weight)
    keys = {"alpha": 0.8, "eps": 0.01, "momentum": 0.7, "weight_decay": 0.1}
    assert stepped("rmsprop_tf", [3.0, -1.0, 0.5], **keys) == pytest.approx(expected, rel=0, abs=ulps(3 * 10, 3))


def test_lamb_scales_adams_update_to_the_weights_norm_and_does_not_clip() -> None:
    """By hand: Adam's first update is the gradient's sign, decay is added, and the whole has the weight's norm."""
    for gradient in (3.0, 3000.0):
        (weight,) = stepped("lamb", [gradient], weight_decay=0.1, eps=1e-12)
        assert weight == pytest.approx(2.0 - 0.2 * 2.0, rel=0, abs=ulps(20, 2))
    (weight,) = stepped("lamb", [3.0], weight_decay=0.0, eps=1e-12)
    assert weight == pytest.approx(2.0 - 0.2, rel=0, abs=ulps(20, 2))


@pytest.mark.parametrize("name", ["adamw", "soap"])
def test_decoupled_decay_takes_lr_times_decay_of_a_weight(name: str) -> None:
    """Without a gradient nothing else changes it. SOAP's first step only measures and changes nothing."""
    found = stepped(name, [0.0, 0.0], weight_decay=0.1)
    first = 2.0 if name == "soap" else 2.0 * (1 - 0.2 * 0.1)
    assert found == pytest.approx([first, first * (1 - 0.2 * 0.1)], rel=0, abs=ulps(3, 2))


def test_soap_converges_faster_than_adam_on_a_rotated_quadratic() -> None:
    """A rotated, badly conditioned quadratic: the case for preconditioning in an eigenbasis."""
    torch.manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(8, 8))
    target = torch.randn(8, 8)
    heights: dict[str, float] = {}
    for name in ("adamw", "soap"):
        weight = nn.Parameter(torch.zeros(8, 8))
        layer = nn.Module()
        layer.register_parameter("weight", weight)
        optimizer = build_optimizer(layer, train(optimizer=name, lr=0.03))
        scale = torch.logspace(0, -2, 8)[:, None]
        for _ in range(300):
            optimizer.zero_grad()
            loss = (scale * (turn @ (weight - target))).square().sum()
            loss.backward()
            optimizer.step()
        heights[name] = loss.item()
    assert heights["soap"] < 0.5 * heights["adamw"]


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "rmsprop_tf", "soap"])
def test_weight_decay_is_for_kernels_alone(name: str) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    frozen = nn.Linear(2, 2).requires_grad_(False)
    optimizer = build_optimizer(nn.ModuleList([module, frozen]), train(optimizer=name, weight_decay=0.3))
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


def test_one_step_of_sgd_equals_the_value_by_hand() -> None:
    layer = nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(2.0)
        layer.bias.fill_(1.0)
    optimizer = build_optimizer(layer, train(optimizer="sgd", momentum=0.0, weight_decay=0.5))
    layer(torch.tensor([[3.0]])).sum().backward()
    optimizer.step()
    # 2 - 0.2 (3 + 0.5 * 2) and 1 - 0.2: no decay on the bias.
    assert (layer.weight.item(), layer.bias.item()) == pytest.approx((1.2, 0.8), rel=0, abs=ulps(4, 4))


def test_a_warm_up_as_long_as_the_training_is_refused() -> None:
    config = train(warmup_steps=12)
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    with raises("train.warmup-too-long"):
        build_schedule(optimizer, config, total_steps=12)
    build_schedule(optimizer, config, total_steps=13)
