"""Losses on patch tokens against hand numbers and float64 loops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.student.losses import token_cosine, token_mse
from tests.errors import raises
from tests.pipeline.student.losses.batches import SEEDS, assert_equals_oracle, law, random_pair
from tests.pipeline.student.losses.test_embedding import cosine_error
from tests.tolerances import magnitude_of, ulps


def over_tokens(of_pair: Callable[[Tensor, Tensor], Tensor], student_BPD: Tensor, teacher_BPD: Tensor) -> Tensor:
    """The mean over positions, then over rows, in float64."""
    rows = zip(student_BPD, teacher_BPD.double(), strict=True)
    means = [torch.stack([of_pair(*pair) for pair in zip(*row, strict=True)]).mean() for row in rows]
    return torch.stack(means).mean()


def test_token_cosine_gives_the_value_by_hand() -> None:
    teacher_BPD = torch.tensor([3.0, 4.0]).expand(2, 2, 2)
    student_BPD = torch.tensor([[[6.0, 8.0], [-3.0, -4.0]], [[4.0, -3.0], [5.0, 0.0]]])
    # 1 − cosine of the four tokens: 0, 2, 1, 0.4.
    assert token_cosine(student_BPD, teacher_BPD).item() == pytest.approx(3.4 / 4, rel=0, abs=cosine_error(4, 2))


def test_token_mse_gives_the_value_by_hand() -> None:
    student_BPD, teacher_BPD = torch.tensor([[[1.0, 2.0], [0.0, 5.0]]]), torch.tensor([[[3.0, 1.0], [0.0, 5.0]]])
    assert token_mse(student_BPD, teacher_BPD).item() == 5 / 4


@law
@given(seed=SEEDS, num_rows=st.integers(1, 3), num_tokens=st.integers(1, 4))
def test_both_equal_a_float64_loop(seed: int, num_rows: int, num_tokens: int) -> None:
    student_BPD, teacher_BPD = random_pair(seed, num_rows, num_tokens, 5, scale=4.0)
    num_pairs, largest = num_rows * num_tokens, magnitude_of(student_BPD) + magnitude_of(teacher_BPD)
    shortest = student_BPD.norm(dim=2).min().item()
    assert_equals_oracle(
        lambda student_BPD: token_cosine(student_BPD, teacher_BPD),
        lambda exact_BPD: over_tokens(lambda s, t: 1 - s @ t / (s.norm() * t.norm()), exact_BPD, teacher_BPD),
        student_BPD,
        value_error=cosine_error(num_pairs, 5),
        gradient_error=ulps(4 * 5 + 12, 2 / shortest) / num_pairs,
    )
    assert_equals_oracle(
        lambda student_BPD: token_mse(student_BPD, teacher_BPD),
        lambda exact_BPD: over_tokens(lambda s, t: ((s - t) ** 2).mean(), exact_BPD, teacher_BPD),
        student_BPD,
        value_error=ulps(5 * num_pairs + 4, largest**2),
        gradient_error=ulps(6, 2 * largest) / (5 * num_pairs),
    )


@pytest.mark.parametrize("loss", [token_cosine, token_mse])
def test_other_grids_and_widths_are_refused_and_no_rows_give_zero(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    for shape in ((2, 4, 6), (2, 9, 5), (1, 4, 5)):
        with raises("loss.shapes-differ"):
            loss(torch.ones(2, 4, 5), torch.ones(shape))
    student_BPD = torch.ones(0, 4, 5, requires_grad=True)
    loss(student_BPD, torch.ones(0, 4, 5)).backward()
    assert student_BPD.grad is not None


@pytest.mark.parametrize("loss", [token_cosine, token_mse])
def test_half_precision_is_computed_in_fp32(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    student_BPD, teacher_BPD = random_pair(0, 2, 4, 5, scale=100.0)
    half_BPD = student_BPD.half()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(half_BPD, teacher_BPD)
    assert value.dtype == torch.float32
    assert value == loss(half_BPD.float(), teacher_BPD)
