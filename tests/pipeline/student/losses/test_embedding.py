"""Losses on embeddings against hand numbers and float64 loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.student.losses import cosine, mse, sifn, smooth_l1
from tests.pipeline.student.losses.batches import SEEDS, assert_equals_oracle, law, mean_over, random_pair
from tests.tolerances import magnitude_of, ulps

rows = st.integers(1, 6)


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
@given(seed=SEEDS, num_rows=rows, factor=st.sampled_from([0.25, 1.0, 3.0, 1024.0]))
def test_cosine_equals_a_float64_loop_at_any_length_of_either_side(seed: int, num_rows: int, factor: float) -> None:
    student_BD, teacher_BD = random_pair(seed, num_rows, 5, scale=4.0)
    student_BD, teacher_BD = factor * student_BD, teacher_BD / factor

    def oracle(student_BD: Tensor) -> Tensor:
        pairs = zip(student_BD, teacher_BD.double(), strict=True)
        return mean_over([1 - s @ t / ((s @ s).sqrt() * (t @ t).sqrt()) for s, t in pairs], student_BD)

    # The unit vectors and the cosine once more, the sum over D of the chain rule, and 6 operations on entries of at
    # most 2/‖s‖.
    shortest = student_BD.norm(dim=1).min().item()
    assert_equals_oracle(
        lambda student_BD: cosine(student_BD, teacher_BD),
        oracle,
        student_BD,
        value_error=cosine_error(num_rows, 5),
        gradient_error=ulps(4 * 5 + 11, 2 / shortest) / num_rows,
    )


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
def test_mse_equals_the_mean_in_float64(seed: int, num_rows: int) -> None:
    student_BD, teacher_BD = random_pair(seed, num_rows, 5, scale=4.0)
    difference_BD = student_BD.double() - teacher_BD.double()
    assert_equals_oracle(
        lambda student_BD: mse(student_BD, teacher_BD),
        lambda student_BD: ((student_BD - teacher_BD) ** 2).mean(),
        student_BD,
        # A difference has a relative error of one rounding; its square, 5 sums and B of positive numbers, 2 divisions.
        value_error=ulps(2 + 1 + 5 + num_rows + 2, difference_BD.square().mean().item()),
        # The difference, times 2, two divisions.
        gradient_error=ulps(4, magnitude_of(2 * difference_BD / difference_BD.numel())),
    )


def test_smooth_l1_gives_the_values_by_hand() -> None:
    student_BD, teacher_BD = torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.5, 3.0], [-4.0, 2.0]])
    assert smooth_l1(student_BD, teacher_BD).item() == (0.125 + 2.5 + 3.5 + 0) / 4
    assert smooth_l1(student_BD, teacher_BD, beta=4.0).item() == (0.25 + 9 + 16) / 8 / 4


@law
@given(seed=SEEDS, num_rows=rows, beta=st.sampled_from([0.1, 1.0, 3.0]))
def test_smooth_l1_equals_a_float64_loop(seed: int, num_rows: int, beta: float) -> None:
    student_BD, teacher_BD = random_pair(seed, num_rows, 5, scale=4.0)
    distance_BD = (student_BD.double() - teacher_BD.double()).abs()

    def oracle(student_BD: Tensor) -> Tensor:
        pairs = zip(student_BD.flatten(), teacher_BD.double().flatten(), strict=True)
        distances = [(s - t).abs() for s, t in pairs]
        return mean_over([d * d / (2 * beta) if d < beta else d - beta / 2 for d in distances], student_BD)

    assert_equals_oracle(
        lambda student_BD: smooth_l1(student_BD, teacher_BD, beta=beta),
        oracle,
        student_BD,
        # The difference, its square over 2 beta or a difference more, 5 sums and B of positive numbers, 2 divisions.
        value_error=ulps(2 + 3 + 5 + num_rows + 2, distance_BD.mean().item() + beta),
        # The difference over beta, at most 1, and the two divisions.
        gradient_error=ulps(4, 1 / distance_BD.numel()),
    )


@law
@given(seed=SEEDS, num_rows=rows, increase=st.sampled_from([0.01, 1.0, 5.0]))
def test_sifn_is_the_squared_increase_of_the_norm(seed: int, num_rows: int, increase: float) -> None:
    student_BD, _ = random_pair(seed, num_rows, 5, scale=4.0)

    def oracle(student_BD: Tensor) -> Tensor:
        norm_B = student_BD.square().sum(dim=1).sqrt()
        return (norm_B - (norm_B.detach() + increase)).square().mean()

    assert_equals_oracle(
        lambda student_BD: sifn(student_BD, increase=increase),
        oracle,
        student_BD,
        # The increase in fp32, its square, the mean over rows.
        value_error=ulps(2 + 1 + num_rows + 1, increase**2),
        # The norm: squares, 5 sums, a root; then entry over norm, times twice the increase, over B.
        gradient_error=ulps((1 + 5 + 1) + 1 + 3 + 1, 2 * increase / num_rows),
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
