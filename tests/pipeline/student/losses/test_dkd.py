"""DKD against hand numbers, the paper's decomposition of KD, and a float64 loop."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.student.losses import dkd, kd
from tests.pipeline.student.losses.batches import (
    SEEDS,
    assert_equals_oracle,
    labelled_rows,
    law,
    mean_over,
    random_batch,
    without_partners,
)
from tests.tolerances import kl_error, log_softmax_error, ulps


def kl(p_K: Tensor, q_K: Tensor) -> Tensor:
    return (p_K * (p_K / q_K).log()).sum()


def oracle(student_BK: Tensor, batch: dict[str, Tensor], temperature: float, alpha: float, beta: float) -> Tensor:
    """Row by row: the share of each label times its loss, from probabilities."""
    rows: list[Tensor] = []
    for row, labels in labelled_rows(batch):
        q_K, p_K = ((side[row].double() / temperature).softmax(0) for side in (student_BK, batch["teacher_BK"]))
        losses: list[Tensor] = []
        for label, share in labels:
            others = [k for k in range(len(p_K)) if k != label]
            target = kl(torch.stack([p_K[label], 1 - p_K[label]]), torch.stack([q_K[label], 1 - q_K[label]]))
            rest = kl(p_K[others] / p_K[others].sum(), q_K[others] / q_K[others].sum())
            losses.append(share * (alpha * target + beta * rest))
        rows.append(temperature**2 * torch.stack(losses).sum())
    return mean_over(rows, student_BK)


def value_error(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> float:
    """Of TCKD or NCKD times T², mean over the rows.

    NCKD is a KL of log-probabilities, TCKD one of two log-sigmoids: 4 operations more, on log odds, which are errors of
    a log-probability away from exact ones. Differences of log odds are at most those of log-probabilities of the target
    and of the others together. Labels are mixed in 3 operations, TCKD and NCKD added up in 3.
    """
    student_BK, teacher_BK = student_BK.detach() / temperature, teacher_BK / temperature
    largest = 2 * max(logits_BK.abs().max().item() for logits_BK in (student_BK, teacher_BK)) + 1
    of_odds = log_softmax_error(student_BK) + log_softmax_error(teacher_BK)
    return temperature**2 * (kl_error(student_BK, teacher_BK) + (of_odds + ulps(10)) * 2 * largest)


@pytest.mark.parametrize(("label", "target", "others"), [(0, 0.058892, 0.0), (1, 0.016417, 0.056633)])
def test_dkd_gives_the_values_by_hand(label: int, target: float, others: float) -> None:
    """The teacher's probabilities are 1/2, 1/4, 1/4; the student's are equal."""
    teacher_BK = torch.tensor([[math.log(2), 0.0, 0.0]])

    def value(alpha: float, beta: float) -> float:
        labels = torch.tensor([label])
        return dkd(torch.zeros(1, 3), teacher_BK, labels, temperature=1.0, alpha=alpha, beta=beta).item()

    # The expected numbers have six digits.
    error = value_error(torch.zeros(1, 3), teacher_BK, 1.0) + 0.5e-6
    assert value(1, 0) == pytest.approx(target, rel=0, abs=error)
    assert value(0, 1) == pytest.approx(others, rel=0, abs=error)
    assert value(2, 8) == pytest.approx(2 * target + 8 * others, rel=0, abs=10 * error)


@law
@given(
    seed=SEEDS,
    num_rows=st.integers(1, 6),
    num_classes=st.integers(2, 6),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    mixed=st.booleans(),
)
def test_dkd_equals_a_float64_loop_over_the_rows_with_each_label(
    seed: int, num_rows: int, num_classes: int, temperature: float, mixed: bool
) -> None:
    batch = random_batch(seed, num_rows, num_classes)
    batch = batch if mixed else without_partners(batch)
    student_BK, teacher_BK = batch.pop("student_BK"), batch["teacher_BK"]
    # The gradient, T · (0.7 · that of TCKD + 3 · that of NCKD) / rows: each is a difference of probabilities, with the
    # errors of their logarithms and 12 operations.
    of_logs = log_softmax_error(student_BK / temperature) + log_softmax_error(teacher_BK / temperature)
    assert_equals_oracle(
        lambda student_BK: dkd(student_BK, **batch, temperature=temperature, alpha=0.7, beta=3.0),
        lambda student_BK: oracle(student_BK, batch, temperature, 0.7, 3.0),
        student_BK,
        value_error=3.7 * value_error(student_BK, teacher_BK, temperature),
        gradient_error=temperature * 3.7 * (of_logs + ulps(12)) / max(len(labelled_rows(batch)), 1),
    )


@law
@given(seed=SEEDS, num_classes=st.integers(2, 8), temperature=st.sampled_from([1.0, 4.0]))
def test_tckd_and_weighted_nckd_add_up_to_kd(seed: int, num_classes: int, temperature: float) -> None:
    """Equation 7 of the paper: KD = TCKD + (1 − p) · NCKD, p the teacher's probability of the target."""
    batch = random_batch(seed, 1, num_classes)
    student_BK, teacher_BK, labels_B = batch["student_BK"], batch["teacher_BK"], torch.tensor([seed % num_classes])
    others = 1 - (teacher_BK / temperature).softmax(dim=1)[0, labels_B].item()
    loss = dkd(student_BK, teacher_BK, labels_B, temperature=temperature, alpha=1.0, beta=others)
    # Both are fp32, and so is the weight of the others.
    error = 3 * value_error(student_BK, teacher_BK, temperature)
    expected = kd(student_BK, teacher_BK, temperature=temperature).item()
    assert loss.item() == pytest.approx(expected, rel=0, abs=error)


def test_dkd_of_equal_logits_is_zero_with_zero_gradient() -> None:
    batch = random_batch(1, 5, 7)
    student_BK = batch["teacher_BK"].clone().requires_grad_()
    loss = dkd(student_BK, batch["teacher_BK"], torch.arange(5), temperature=4.0)
    loss.backward()
    # Equal logits take equal steps on both sides: their differences are 0.
    assert loss.item() == 0
    of_logs = log_softmax_error(student_BK / 4)
    assert student_BK.grad.abs().max() <= 4 * 9 * 2 * (of_logs + ulps(12)) / 5


def test_dkd_is_finite_where_the_official_form_is_infinite() -> None:
    """Teacher and student are saturated at different classes: log odds of the target 200 and −200."""
    student_BK = torch.tensor([[-100.0, 100.0, -100.0]], requires_grad=True)
    loss = dkd(student_BK, torch.tensor([[100.0, -100.0, -100.0]]), torch.tensor([0]), temperature=1.0, beta=0.0)
    loss.backward()
    assert loss.item() == pytest.approx(200, rel=ulps(10))
    assert student_BK.grad[0].tolist() == pytest.approx([-1, 1, 0], rel=0, abs=ulps(12))
