"""Losses on embeddings against hand numbers, float64 loops and the gradients that their formulas have."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.student.losses import cosine, mse, sifn
from tests.pipeline.student.losses.batches import SEEDS, law, random_pair
from tests.tolerances import ulps

rows = st.integers(1, 6)


def random_embeddings(seed: int, num_rows: int) -> tuple[Tensor, Tensor]:
    student_BD, teacher_BD = random_pair(seed, num_rows, 5, scale=4.0)
    return student_BD.requires_grad_(), teacher_BD


def exact(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().double().numpy() for tensor in tensors]


def cosine_error(num_rows: int, width: int) -> float:
    """A squared norm of each side and their product are sums of D, of unit vectors; a root and a division each, the
    difference from 1, and the mean over rows of values up to 2.
    """
    return ulps(3 * width + 5) + ulps(num_rows + 1, 2)


def test_cosine_gives_the_values_by_hand() -> None:
    teacher_BD = torch.tensor([[3.0, 4.0]]).expand(4, 2)
    student_BD = torch.tensor([[6.0, 8.0], [-3.0, -4.0], [4.0, -3.0], [5.0, 0.0]])
    values = [cosine(student_BD[row : row + 1], teacher_BD[:1]).item() for row in range(4)]
    assert values == pytest.approx([0, 2, 1, 0.4], rel=0, abs=cosine_error(1, 2))
    assert cosine(student_BD, teacher_BD).item() == pytest.approx(3.4 / 4, rel=0, abs=cosine_error(4, 2))


@law
@given(seed=SEEDS, num_rows=rows)
def test_cosine_equals_a_float64_loop_with_its_closed_form_gradient(seed: int, num_rows: int) -> None:
    student_BD, teacher_BD = random_embeddings(seed, num_rows)
    loss = cosine(student_BD, teacher_BD)
    loss.backward()
    value, gradient_BD = 0.0, np.zeros((num_rows, 5))
    for row, (s, t) in enumerate(zip(*exact(student_BD, teacher_BD), strict=True)):
        s_norm, t_norm = math.sqrt(s @ s), math.sqrt(t @ t)
        cos = s @ t / (s_norm * t_norm)
        value += (1 - cos) / num_rows
        gradient_BD[row] = -(t / t_norm - cos * s / s_norm) / s_norm / num_rows
    assert loss.item() == pytest.approx(value, rel=0, abs=cosine_error(num_rows, 5))
    # The unit vectors and the cosine once more, the sum over D of the chain rule, and 6 operations on entries of at
    # most 2/‖s‖.
    shortest = student_BD.detach().norm(dim=1).min().item()
    error = ulps(4 * 5 + 11, 2 / shortest) / num_rows
    np.testing.assert_allclose(student_BD.grad, gradient_BD, rtol=0, atol=error)


@law
@given(seed=SEEDS, factor=st.sampled_from([0.25, 3.0, 1024.0]))
def test_cosine_ignores_the_length_of_either_side(seed: int, factor: float) -> None:
    student_BD, teacher_BD = random_embeddings(seed, 4)
    # Both are fp32, and the factors round both sides.
    error = 2 * cosine_error(4, 5) + ulps(2)
    scaled = cosine(factor * student_BD, teacher_BD / factor).item()
    assert scaled == pytest.approx(cosine(student_BD, teacher_BD).item(), rel=0, abs=error)


def test_an_embedding_without_direction_has_cosine_zero_and_a_bounded_gradient() -> None:
    student_BD = torch.zeros(1, 2, requires_grad=True)
    loss = cosine(student_BD, torch.tensor([[3.0, 4.0]]))
    loss.backward()
    assert loss.item() == 1
    assert student_BD.grad.norm() == pytest.approx(1e4, rel=ulps(3 * 2 + 5))
    assert cosine(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)).item() == 1


def test_mse_gives_the_value_by_hand() -> None:
    assert mse(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 1.0], [0.0, 1.0]])).item() == 6 / 4


@law
@given(seed=SEEDS, num_rows=rows)
def test_mse_equals_a_float64_mean_with_its_closed_form_gradient(seed: int, num_rows: int) -> None:
    student_BD, teacher_BD = random_embeddings(seed, num_rows)
    loss = mse(student_BD, teacher_BD)
    loss.backward()
    student, teacher = exact(student_BD, teacher_BD)
    # A difference has a relative error of one rounding; its square, 5 sums and B of positive numbers, 2 divisions.
    assert loss.item() == pytest.approx(np.mean((student - teacher) ** 2), rel=ulps(2 + 1 + 5 + num_rows + 2))
    # The difference, times 2, two divisions.
    np.testing.assert_allclose(student_BD.grad, 2 * (student - teacher) / student.size, rtol=ulps(4), atol=0)


@law
@given(seed=SEEDS, num_rows=rows, increase=st.sampled_from([0.01, 1.0, 5.0]))
def test_sifn_is_the_increase_squared_with_an_outward_gradient(seed: int, num_rows: int, increase: float) -> None:
    student_BD, _ = random_embeddings(seed, num_rows)
    loss = sifn(student_BD, increase=increase)
    loss.backward()
    # The increase in fp32, its square, the mean over rows.
    assert loss.item() == pytest.approx(increase**2, rel=ulps(2 + 1 + num_rows + 1))
    (student,) = exact(student_BD)
    unit_BD = student / np.sqrt((student**2).sum(axis=1, keepdims=True))
    # The norm: squares, 5 sums, a root; then entry over norm, times twice the increase, over B.
    np.testing.assert_allclose(
        student_BD.grad, -2 * increase * unit_BD / num_rows, rtol=ulps((1 + 5 + 1) + 1 + 3 + 1), atol=0
    )


def test_sifn_does_not_lose_a_small_increase_in_a_large_norm() -> None:
    embedding_BD = torch.tensor([[3e9, 4e9]], requires_grad=True)
    loss = sifn(embedding_BD, increase=0.5)
    loss.backward()
    assert loss.item() == 0.25
    assert embedding_BD.grad[0].tolist() == pytest.approx([-0.6, -0.8], rel=ulps((1 + 2 + 1) + 1 + 3 + 1))


def test_a_zero_row_does_not_grow() -> None:
    embedding_BD = torch.zeros(2, 3, requires_grad=True)
    sifn(embedding_BD).backward()
    assert torch.equal(embedding_BD.grad, torch.zeros(2, 3))
