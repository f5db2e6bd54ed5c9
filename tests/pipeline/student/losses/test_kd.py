"""Knowledge distillation against a float64 loop."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.student.losses import kd
from tests.pipeline.student.losses.batches import SEEDS, assert_equals_oracle, law, mean_over, random_pair
from tests.tolerances import kl_error, log_softmax_error, ulps

TEMPERATURES = st.sampled_from([0.5, 1.0, 4.0, 20.0])


def oracle(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    rows: list[Tensor] = []
    for logits in zip(student_BK / temperature, teacher_BK.double() / temperature, strict=True):
        q_K, p_K = (row_K.exp() / row_K.exp().sum() for row_K in logits)
        rows.append(temperature**2 * (p_K * (p_K.log() - q_K.log())).sum())
    return mean_over(rows, student_BK)


def gradient_error(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> float:
    """Of ``T · (q − p) / B``: each probability is the exp of a logarithm with an error; q also takes the sum over K of
    the chain rule; then difference, T², 1/T and 1/B.
    """
    of_logs = log_softmax_error(student_BK / temperature) + log_softmax_error(teacher_BK / temperature)
    return temperature * (of_logs + ulps(student_BK.shape[1] + 6)) / len(student_BK)


@law
@given(
    seed=SEEDS,
    temperature=TEMPERATURES,
    num_rows=st.integers(1, 5),
    num_classes=st.integers(2, 8),
    shift=st.floats(-10, 10),
)
def test_kd_equals_a_float64_loop(seed: int, temperature: float, num_rows: int, num_classes: int, shift: float) -> None:
    """Also if a constant is added to the logits of a side, which changes no probability."""
    student_BK, teacher_BK = random_pair(seed, num_rows, num_classes, scale=3.0)
    student_BK, teacher_BK = student_BK + shift, teacher_BK - shift
    assert_equals_oracle(
        lambda student_BK: kd(student_BK, teacher_BK, temperature=temperature),
        lambda student_BK: oracle(student_BK, teacher_BK, temperature),
        student_BK,
        # T² multiplies the rounding of a small divergence.
        value_error=temperature**2 * kl_error(student_BK / temperature, teacher_BK / temperature),
        gradient_error=gradient_error(student_BK, teacher_BK, temperature),
    )


@law
@given(seed=SEEDS, temperature=TEMPERATURES)
def test_kd_of_equal_logits_is_zero_with_zero_gradient(seed: int, temperature: float) -> None:
    teacher_BK, _ = random_pair(seed, 5, 7, scale=3.0)
    student_BK = teacher_BK.clone().requires_grad_()
    loss = kd(student_BK, teacher_BK, temperature=temperature)
    loss.backward()
    assert loss.item() == 0
    assert student_BK.grad.abs().max() <= gradient_error(student_BK, teacher_BK, temperature)
