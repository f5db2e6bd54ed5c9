"""One update: scaled, clipped, stepped, averaged, or skipped as a whole."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.models import load_model
from pipeline.student.networks.student import Student
from pipeline.student.run import checkpoint
from pipeline.student.training.optimizer_step import OptimizerStep
from schemas.config import StudentConfig, TrainConfig
from tests.errors import raises
from tests.pipeline.student.runs import NORMALISED, state_of
from tests.tolerances import reordered, ulps

CPU = torch.device("cpu")
IMAGES = torch.rand(6, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def begin(**keys: Any) -> tuple[Student, OptimizerStep]:
    section = StudentConfig.model_validate(NORMALISED)
    loaded = load_model(section, widths={"logits": 10}, size=12, seed=0, where="student")
    student = Student(loaded.module, teacher_dims=[]).train()
    train = TrainConfig.model_validate({"lr": 0.1, "optimizer": "sgd", "schedule": "constant", **keys})
    return student, OptimizerStep(student, train, total_steps=100, device=CPU)


def loss_of(student: Student, step: int = 0) -> Tensor:
    return student(IMAGES + step).outputs["logits"].square().mean()


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, expected[name]) for name, value in actual.items())


def test_the_gradient_norm_is_reported_before_clipping_and_the_step_taken_after_it() -> None:
    student, optimizer_step = begin(clip_norm=1e-3, momentum=0.0)
    before = [parameter.detach().clone() for parameter in student.parameters()]
    optimizer_step.backward(loss_of(student))
    squares = sum(float(parameter.grad.double().square().sum()) for parameter in student.parameters())
    update = optimizer_step.step()
    assert update.grad_norm is not None
    num_parameters = sum(parameter.numel() for parameter in student.parameters())
    assert float(update.grad_norm) == pytest.approx(math.sqrt(squares), rel=reordered(num_parameters))
    moved = sum(
        float((new.detach() - old).double().square().sum())
        for new, old in zip(student.parameters(), before, strict=True)
    )
    # Each new weight is rounded to half a unit in its last place.
    norm = math.sqrt(sum(float(parameter.double().square().sum()) for parameter in before))
    assert math.sqrt(moved) == pytest.approx(0.1 * 1e-3, rel=0, abs=ulps(1, norm))


def test_without_clipping_no_norm_is_computed() -> None:
    student, optimizer_step = begin()
    optimizer_step.backward(loss_of(student))
    update = optimizer_step.step()
    assert (update.lr, update.grad_norm, update.scale) == (0.1, None, None)


def test_scaling_and_clipping_give_the_step_of_an_unscaled_loss() -> None:
    """The network itself in fp32: what is left is the scaler, which divides by a power of two before it clips."""
    moved: list[dict[str, Tensor]] = []
    for precision in ("fp32", "fp16"):
        student, optimizer_step = begin(precision=precision, clip_norm=0.01)
        optimizer_step.backward(loss_of(student))
        optimizer_step.step()
        moved.append(values(student))
    assert same(*moved)


def test_a_step_whose_gradients_overflow_moves_nothing_but_the_scale() -> None:
    student, optimizer_step = begin(precision="fp16", warmup_steps=10, ema=0.9, clip_norm=1.0)
    optimizer_step.backward(loss_of(student))
    optimizer_step.step()
    before, averaged = values(student), values(optimizer_step.evaluated)
    optimizer_step.backward(loss_of(student).detach() * 0 + math.inf * next(student.parameters()).sum())
    update = optimizer_step.step()
    assert update.scale == 32768
    assert update.grad_norm is not None
    assert not math.isfinite(float(update.grad_norm))
    assert optimizer_step.num_updates == 1
    assert optimizer_step.optimizer.param_groups[0]["lr"] == pytest.approx(0.02)
    after = values(student)
    trained = {name for name, _ in student.named_parameters()}
    assert same({name: before[name] for name in trained}, after)
    assert same(averaged, values(optimizer_step.evaluated))


def test_a_first_step_that_is_skipped_is_no_reason_to_warn() -> None:
    student, optimizer_step = begin(precision="fp16")
    optimizer_step.backward(math.inf * next(student.parameters()).sum())
    optimizer_step.step()
    optimizer_step.backward(loss_of(student))
    optimizer_step.step()
    assert optimizer_step.num_updates == 1


def test_gradients_that_overflow_at_any_scale_stop_the_training_with_the_steps() -> None:
    student, optimizer_step = begin(precision="fp16")
    for _ in range(29):
        optimizer_step.backward(math.inf * next(student.parameters()).sum())
        optimizer_step.step()
    optimizer_step.check(where="between steps 0 and 28")
    optimizer_step.backward(math.inf * next(student.parameters()).sum())
    optimizer_step.step()
    with raises("train.fp16-overflow") as caught:
        optimizer_step.check(where="between steps 0 and 29")
    assert caught.value.where == "between steps 0 and 29"


@pytest.mark.parametrize("decay", [0.3, 0.9999])
def test_averaged_weights_and_statistics_are_those_of_a_loop(decay: float) -> None:
    """In float64 by hand: the first update copies, update n + 1 retains min(decay, n / (9 + n)) of the average."""
    student, optimizer_step = begin(ema=decay, momentum=0.0)
    expected: dict[str, Tensor] = {}
    largest: dict[str, float] = {}
    for step in range(8):
        optimizer_step.backward(loss_of(student, step))
        optimizer_step.step()
        share = min(decay, step / (9 + step))
        for name, value in student.model.state_dict().items():
            expected[name] = value.double() if step == 0 else share * expected[name] + (1 - share) * value.double()
            largest[name] = max(largest.get(name, 0.0), value.double().abs().max().item())
    found = optimizer_step.evaluated.state_dict()
    assert "network.conv1.1.running_mean" in found
    for name, value in found.items():
        if value.is_floating_point():
            # Every update: the difference, its product with the share (itself rounded), the sum.
            torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=ulps(8 * 4, largest[name]))
        else:
            assert torch.equal(value, student.model.state_dict()[name])
    assert not same(found, student.model.state_dict())


def test_averaged_weights_forget_the_first_ones_in_a_short_run() -> None:
    """Without the warm-up of the decay, 0.99 ** 30 = 74 % of the average would be the first weights."""
    student, optimizer_step = begin(ema=0.99, momentum=0.0, lr=1e-6)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(100.0)
    optimizer_step.backward(0 * loss_of(student))
    optimizer_step.step()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(1.0)
    for _ in range(29):
        optimizer_step.backward(0 * loss_of(student))
        optimizer_step.step()
    weight = optimizer_step.evaluated.state_dict()["network.fc.weight"]
    assert float(weight.max()) < 1.01


def test_without_an_average_the_trained_weights_are_evaluated() -> None:
    student, optimizer_step = begin()
    assert optimizer_step.evaluated is student.model
    assert list(optimizer_step.averaged_buffers()) == []


@pytest.mark.parametrize(
    "keys",
    [
        {"optimizer": name, "precision": precision, "schedule": schedule, **more}
        for name, precision, schedule, more in (
            ("sgd", "fp16", "cosine", {}),
            ("adamw", "fp32", "step", {"milestones": [1]}),
            ("lamb", "fp32", "exponential", {"decay_epochs": 0.3}),
            ("rmsprop_tf", "fp16", "constant", {"eps": 1e-3}),
            ("soap", "fp32", "cosine", {}),
            ("soap", "fp16", "cosine", {"clip_norm": 0.1}),
        )
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_every_optimiser_comes_back_bitwise(tmp_path: Path, keys: dict[str, Any]) -> None:
    """Through a file, after more steps than SOAP needs for its first new basis, one of them skipped under fp16."""

    def steps(student: Student, optimizer_step: OptimizerStep, numbers: range) -> None:
        for number in numbers:
            overflow = math.inf if keys["precision"] == "fp16" and number % 5 == 1 else 1.0
            optimizer_step.backward(overflow * loss_of(student, number))
            optimizer_step.step()

    config = {"warmup_steps": 2, "weight_decay": 0.1, "lr": 0.01, **keys}
    student, optimizer_step = begin(**config)
    steps(student, optimizer_step, range(13))
    state = {"model": student.state_dict(), **optimizer_step.state_dict()}
    checkpoint.save(str(tmp_path), checkpoint.LAST, state)
    saved = state_of(tmp_path)
    resumed, resumed_step = begin(**config)
    resumed.load_state_dict(saved["model"])
    resumed_step.load_state_dict(saved)
    before = values(student)
    steps(student, optimizer_step, range(13, 26))
    steps(resumed, resumed_step, range(13, 26))
    assert same(values(student), values(resumed))
    assert not same(values(student), before)
    assert optimizer_step.num_updates == resumed_step.num_updates == (21 if keys["precision"] == "fp16" else 26)
