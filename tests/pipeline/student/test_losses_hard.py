"""Hard distillation: the teacher's first choice is the label."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from pipeline.errors import ModelError
from pipeline.student.losses import hard

# A loaded machine is no finding.
law = settings(deadline=None, max_examples=40)


def test_hard_gives_the_value_by_hand() -> None:
    """Student probabilities 1/2, 1/4, 1/4; the teacher chooses class 1, then class 0."""
    student_BK = torch.tensor([[math.log(2), 0.0, 0.0]] * 2)
    teacher_BK = torch.tensor([[0.0, 0.1, 0.0], [9.0, -1.0, 8.9]])
    assert hard(student_BK, teacher_BK).item() == pytest.approx((math.log(4) + math.log(2)) / 2, abs=1e-6)


@law
@given(seed=st.integers(0, 2**32 - 1), num_rows=st.integers(1, 6), num_classes=st.integers(2, 8))
def test_value_and_gradient_are_torchs_cross_entropy_in_float64(seed: int, num_rows: int, num_classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student_BK, teacher_BK = 3 * torch.randn(2, num_rows, num_classes, generator=generator)
    exact_BK = student_BK.double().requires_grad_()
    wanted = functional.cross_entropy(exact_BK, teacher_BK.argmax(dim=1))
    loss = hard(student_BK.requires_grad_(), teacher_BK)
    torch.testing.assert_close(loss.double(), wanted)
    torch.testing.assert_close(
        torch.autograd.grad(loss, student_BK)[0].double(), torch.autograd.grad(wanted, exact_BK)[0]
    )


def test_of_equal_logits_the_first_class_counts() -> None:
    student_BK = torch.tensor([[0.0, 5.0]])
    assert hard(student_BK, torch.zeros(1, 2)).item() == pytest.approx(5 + math.log1p(math.exp(-5)), abs=1e-5)


def test_hard_refuses_a_teacher_of_other_classes() -> None:
    with pytest.raises(ModelError, match=r"student \[2, 10\], teacher \[2, 100\]"):
        hard(torch.zeros(2, 10), torch.zeros(2, 100))
