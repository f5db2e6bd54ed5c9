"""Knowledge distillation against torch's own divergence and a float64 loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pipeline.student.losses import kd
from tests.pipeline.student.losses.batches import SEEDS, law, random_pair
from tests.tolerances import kl_error, log_softmax_error, ulps

TEMPERATURES = st.sampled_from([0.5, 1.0, 4.0, 20.0])


def oracle(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> tuple[float, np.ndarray]:
    """Value and gradient ``T · (softmax(s/T) - softmax(t/T)) / B`` in float64, element by element."""
    value, gradient_BK = 0.0, np.zeros(tuple(student_BK.shape))
    for i, (student, teacher) in enumerate(zip(student_BK.tolist(), teacher_BK.tolist(), strict=True)):
        student_total = sum(math.exp(z / temperature) for z in student)
        teacher_total = sum(math.exp(z / temperature) for z in teacher)
        for k, (s, t) in enumerate(zip(student, teacher, strict=True)):
            p, q = math.exp(t / temperature) / teacher_total, math.exp(s / temperature) / student_total
            value += temperature**2 * p * (math.log(p) - math.log(q)) / len(student_BK)
            gradient_BK[i, k] = temperature * (q - p) / len(student_BK)
    return value, gradient_BK


def value_error(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> float:
    """T² multiplies the rounding of a small divergence."""
    return temperature**2 * kl_error(student_BK / temperature, teacher_BK / temperature)


def gradient_error(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> float:
    """Of ``T · (q − p) / B``: each probability is the exp of a logarithm with an error; q also takes the sum over K of
    the chain rule; then difference, T², 1/T and 1/B.
    """
    of_logs = log_softmax_error(student_BK / temperature) + log_softmax_error(teacher_BK / temperature)
    return temperature * (of_logs + ulps(student_BK.shape[1] + 6)) / len(student_BK)


@law
@given(seed=SEEDS, temperature=TEMPERATURES, num_rows=st.integers(1, 5), num_classes=st.integers(2, 8))
def test_kd_equals_a_float64_loop(seed: int, temperature: float, num_rows: int, num_classes: int) -> None:
    student_BK, teacher_BK = random_pair(seed, num_rows, num_classes, scale=3.0)
    value, gradient_BK = oracle(student_BK, teacher_BK, temperature)
    student_BK.requires_grad_()
    loss = kd(student_BK, teacher_BK, temperature=temperature)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=0, abs=value_error(student_BK, teacher_BK, temperature))
    np.testing.assert_allclose(
        student_BK.grad, gradient_BK, rtol=0, atol=gradient_error(student_BK, teacher_BK, temperature)
    )


@law
@given(seed=SEEDS, temperature=TEMPERATURES)
def test_kd_equals_torch_kl_div(seed: int, temperature: float) -> None:
    student_BK, teacher_BK = random_pair(seed, 5, 7, scale=3.0)
    log_student_BK = functional.log_softmax(student_BK / temperature, dim=1)
    log_teacher_BK = functional.log_softmax(teacher_BK / temperature, dim=1)
    divergence = functional.kl_div(log_student_BK, log_teacher_BK, log_target=True, reduction="batchmean")
    # Both are fp32.
    error = 2 * value_error(student_BK, teacher_BK, temperature)
    expected = temperature**2 * divergence.item()
    assert kd(student_BK, teacher_BK, temperature=temperature).item() == pytest.approx(expected, rel=0, abs=error)


@law
@given(seed=SEEDS, temperature=TEMPERATURES, shift=st.floats(-10, 10))
def test_kd_ignores_a_constant_added_to_a_row(seed: int, temperature: float, shift: float) -> None:
    student_BK, teacher_BK = random_pair(seed, 5, 7, scale=3.0)
    loss = kd(student_BK, teacher_BK, temperature=temperature)
    shifted_BK = student_BK + shift, teacher_BK - shift
    shifted = kd(*shifted_BK, temperature=temperature)
    # The shift rounds every logit once, which counts like an error of its log-probability and of the row's sum.
    rounding = 2 * ulps(1, max(logits_BK.abs().max().item() for logits_BK in shifted_BK)) / temperature
    difference_BK = (student_BK / temperature).log_softmax(1) - (teacher_BK / temperature).log_softmax(1)
    of_shift = temperature**2 * rounding * (2 + difference_BK.abs().max().item())
    error = value_error(student_BK, teacher_BK, temperature) + value_error(*shifted_BK, temperature) + of_shift
    assert shifted.item() == pytest.approx(loss.item(), rel=0, abs=error)


@law
@given(seed=SEEDS, temperature=TEMPERATURES)
def test_kd_of_equal_logits_is_zero_with_zero_gradient(seed: int, temperature: float) -> None:
    teacher_BK, _ = random_pair(seed, 5, 7, scale=3.0)
    student_BK = teacher_BK.clone().requires_grad_()
    loss = kd(student_BK, teacher_BK, temperature=temperature)
    loss.backward()
    assert loss.item() == 0
    assert student_BK.grad.abs().max() <= gradient_error(student_BK, teacher_BK, temperature)
