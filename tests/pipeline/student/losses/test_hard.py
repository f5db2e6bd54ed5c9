"""Hard distillation: the class that the teacher predicts is the label."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from pipeline.student.losses import hard
from tests.pipeline.student.losses.batches import SEEDS, assert_equals_oracle, law, random_pair
from tests.tolerances import log_softmax_error, ulps


def test_hard_gives_the_value_by_hand() -> None:
    """Student probabilities 1/2, 1/4, 1/4; the teacher predicts class 1, then class 0."""
    student_BK = torch.tensor([[math.log(2), 0.0, 0.0]] * 2)
    teacher_BK = torch.tensor([[0.0, 0.1, 0.0], [9.0, -1.0, 8.9]])
    assert hard(student_BK, teacher_BK).item() == pytest.approx(
        (math.log(4) + math.log(2)) / 2, abs=ulps(9, math.log(4))
    )


@law
@given(seed=SEEDS, num_rows=st.integers(1, 6), num_classes=st.integers(2, 8))
def test_value_and_gradient_are_torchs_cross_entropy_in_float64(seed: int, num_rows: int, num_classes: int) -> None:
    student_BK, teacher_BK = random_pair(seed, num_rows, num_classes, scale=3.0)
    of_logs = log_softmax_error(student_BK)
    # The mean over rows: B sums and a division of losses up to the largest.
    largest = -student_BK.double().log_softmax(dim=1).min().item()
    assert_equals_oracle(
        lambda student_BK: hard(student_BK, teacher_BK),
        lambda student_BK: functional.cross_entropy(student_BK, teacher_BK.argmax(dim=1)),
        student_BK,
        value_error=of_logs + ulps(num_rows + 1, largest),
        # (softmax − target) / B: exp of a log-probability, the chain rule's sum over K, product, difference, division.
        gradient_error=(of_logs + ulps(num_classes + 4)) / num_rows,
    )


def test_of_equal_logits_the_first_class_counts() -> None:
    student_BK = torch.tensor([[0.0, 5.0]])
    assert hard(student_BK, torch.zeros(1, 2)).item() == pytest.approx(5 + math.log1p(math.exp(-5)), abs=ulps(9, 5))
