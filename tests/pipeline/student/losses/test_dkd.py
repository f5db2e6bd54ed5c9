"""DKD against hand numbers, the paper's decomposition of KD, a float64 loop, and finite differences of that loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.student.losses import dkd, kd
from tests.pipeline.student.losses.batches import SEEDS, law, random_batch
from tests.tolerances import kl_error, log_softmax_error, ulps


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def softmax(logits: list[float]) -> list[float]:
    return [math.exp(z) / sum(map(math.exp, logits)) for z in logits]


def row_losses(student: np.ndarray, teacher: np.ndarray, label: int, temperature: float) -> tuple[float, float]:
    """TCKD and NCKD in float64 from probabilities, without T²."""
    s, t = ([z / temperature for z in side] for side in (student.tolist(), teacher.tolist()))
    p_s, p_t = softmax(s)[label], softmax(t)[label]
    others_s, others_t = ([z for k, z in enumerate(side) if k != label] for side in (s, t))
    return kl([p_t, 1 - p_t], [p_s, 1 - p_s]), kl(softmax(others_t), softmax(others_s))


def oracle(batch: dict[str, Tensor], temperature: float, alpha: float, beta: float) -> float:
    """Row by row: the chance of each label times its loss, over the rows with both labels."""
    student, teacher = (batch[name].double().numpy() for name in ("student_BK", "teacher_BK"))
    rows: list[float] = []
    for row, labels in enumerate(zip(batch["labels_B"].tolist(), batch["mixed_labels_B"].tolist(), strict=True)):
        if min(labels) >= 0:
            share = float(batch["lambda_B"][row])
            losses = [row_losses(student[row], teacher[row], label, temperature) for label in labels]
            loss, mixed_loss = (alpha * target + beta * others for target, others in losses)
            rows.append(share * loss + (1 - share) * mixed_loss)
    return temperature**2 * sum(rows) / max(len(rows), 1)


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
)
def test_dkd_equals_a_float64_loop_over_rows_with_both_labels(
    seed: int, num_rows: int, num_classes: int, temperature: float
) -> None:
    batch = random_batch(seed, num_rows, num_classes)
    loss = dkd(**batch, temperature=temperature, alpha=0.7, beta=3.0)
    error = 3.7 * value_error(batch["student_BK"], batch["teacher_BK"], temperature)
    assert loss.item() == pytest.approx(oracle(batch, temperature, 0.7, 3.0), rel=0, abs=error)


def test_the_gradient_of_dkd_equals_finite_differences_of_the_loop() -> None:
    batch = random_batch(8, 4, 5)
    batch["labels_B"], batch["mixed_labels_B"] = torch.tensor([0, 4, -1, 2]), torch.tensor([3, 4, 1, 2])
    point = batch["student_BK"].double()
    batch["student_BK"].requires_grad_()
    dkd(**batch, temperature=2.0, alpha=0.7, beta=3.0).backward()
    # Of T · (0.7 · that of TCKD + 3 · that of NCKD) / rows: each is a difference of probabilities, with the errors of
    # their logarithms and 12 operations. Finite differences in float64 are exact to 1e-9.
    of_logs = log_softmax_error(batch["student_BK"] / 2) + log_softmax_error(batch["teacher_BK"] / 2)
    error = 2 * 3.7 * (of_logs + ulps(12)) / 3 + 1e-9
    for index in np.ndindex(*point.shape):
        delta = torch.zeros_like(point)
        delta[index] = 1e-5
        ends = [oracle({**batch, "student_BK": point + sign * delta}, 2.0, 0.7, 3.0) for sign in (1, -1)]
        assert batch["student_BK"].grad[index].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=0, abs=error)


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


@law
@given(seed=SEEDS, num_rows=st.integers(1, 6))
def test_a_row_mixed_within_its_class_or_with_lambda_1_has_the_unmixed_loss(seed: int, num_rows: int) -> None:
    batch = random_batch(seed, num_rows, 4)
    student_BK, teacher_BK, labels_B = batch["student_BK"], batch["teacher_BK"], batch["labels_B"]
    plain = dkd(student_BK, teacher_BK, labels_B, temperature=4.0).item()
    same_class = {**batch, "mixed_labels_B": labels_B}
    unmixed = {**batch, "mixed_labels_B": torch.where(labels_B < 0, -1, 0), "lambda_B": torch.ones(num_rows)}
    # The rows' losses are the same bits; lerp between them rounds 3 times, and the mean B + 1 times.
    for mixed in (same_class, unmixed):
        assert dkd(**mixed, temperature=4.0).item() == pytest.approx(plain, rel=ulps(2 * (num_rows + 1) + 3))


def test_the_loss_of_a_mixed_row_is_the_weighted_mean_over_its_labels() -> None:
    batch = random_batch(3, 1, 4)
    mixed = {"mixed_labels_B": torch.tensor([2]), "lambda_B": torch.tensor([0.75])}
    loss_0, loss_2 = (
        dkd(batch["student_BK"], batch["teacher_BK"], torch.tensor([label]), temperature=2.0) for label in (0, 2)
    )
    loss = dkd(batch["student_BK"], batch["teacher_BK"], torch.tensor([0]), temperature=2.0, **mixed)
    torch.testing.assert_close(loss, (3 * loss_0 + loss_2) / 4)


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


def test_nckd_of_two_classes_is_zero() -> None:
    batch = random_batch(2, 6, 2)
    loss = dkd(batch["student_BK"], batch["teacher_BK"], torch.tensor([0, 1] * 3), temperature=1.0, alpha=0.0)
    assert loss.item() == 0
