"""HCL against numbers by hand, a float64 loop over windows, and finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.student.losses import hcl
from tests.pipeline.student.losses.batches import SEEDS, law
from tests.tolerances import ulps


def map_pairs(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """A pair of student and teacher for each shape."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(shape, generator=generator, dtype=dtype), torch.randn(shape, generator=generator, dtype=dtype))
        for shape in shapes
    ]


def window(position: int, size: int, pooled: int) -> slice:
    """Of adaptive pooling: from floor(position · size / pooled) to ceil((position + 1) · size / pooled)."""
    return slice(position * size // pooled, -(-(position + 1) * size // pooled))


def pool(x_BCHW: np.ndarray, side: int) -> np.ndarray:
    height, width = x_BCHW.shape[2:]
    pooled = np.zeros((*x_BCHW.shape[:2], side, side))
    for row, column in np.ndindex(side, side):
        part = x_BCHW[:, :, window(row, height, side), window(column, width, side)]
        pooled[:, :, row, column] = part.mean((2, 3))
    return pooled


def oracle(student_BCHW: np.ndarray, teacher_BCHW: np.ndarray) -> float:
    """One level as the paper has it: both maps are pooled, then compared."""
    loss, weight, total = float(np.mean((student_BCHW - teacher_BCHW) ** 2)), 1.0, 1.0
    for side in (4, 2, 1):
        if side < student_BCHW.shape[2]:
            weight /= 2
            total += weight
            loss += weight * float(np.mean((pool(student_BCHW, side) - pool(teacher_BCHW, side)) ** 2))
    return loss / total


def relative_error(student_BCHW: Tensor) -> float:
    """Of a level's value: a mean of squares at each of four scales.

    A difference of the maps and its square; the mean over C · H · W, then over B; weight, sum of the scales and
    division. Of the coarser scales the mean over a window is a sum of at most H · W numbers that may cancel: its
    rounding is one of the mean of the differences' absolute values, whose square is at most the mean of their squares,
    and counts twice in its square.
    """
    num_rows, *map_shape = student_BCHW.shape
    window = 2 * (map_shape[1] * map_shape[2] + 1)
    return ulps(3 + window + math.prod(map_shape) + num_rows + 2 + 6)


def test_a_map_of_two_positions_by_hand() -> None:
    student = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[None, None]
    # (1 + 4 + 9 + 16) / 4 = 7.5 of the maps and 2.5² = 6.25 of their means, weighing 1/2.
    expected = (7.5 + 6.25 / 2) / 1.5
    assert hcl([student], [torch.zeros(1, 1, 2, 2)]).item() == pytest.approx(expected, rel=relative_error(student))


def test_a_map_of_one_position_has_no_coarser_grid() -> None:
    student, teacher = torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, 4.0]])
    assert hcl([student[:, :, None, None]], [teacher[:, :, None, None]]).item() == (4 + 1) / 2


@law
@given(seed=SEEDS, num_rows=st.integers(1, 3), channels=st.integers(1, 3), side=st.integers(1, 11))
def test_hcl_equals_a_float64_loop_over_windows(seed: int, num_rows: int, channels: int, side: int) -> None:
    ((student, teacher),) = map_pairs(seed, (num_rows, channels, side, side))
    expected = oracle(student.double().numpy(), teacher.double().numpy())
    assert hcl([student], [teacher]).item() == pytest.approx(expected, rel=relative_error(student))


def test_levels_are_summed() -> None:
    pairs = map_pairs(0, (2, 3, 8, 8), (2, 5, 3, 3), (2, 7, 1, 1))
    each = [hcl([student], [teacher]) for student, teacher in pairs]
    torch.testing.assert_close(hcl(*zip(*pairs, strict=True)), torch.stack(each).sum())


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 7, 8])
def test_the_gradient_is_that_of_finite_differences(side: int) -> None:
    ((student, teacher),) = map_pairs(1, (2, 2, side, side), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: hcl([x], [teacher]), (student.requires_grad_(),))


@pytest.mark.parametrize("side", [1, 2, 5, 7, 8])
def test_deterministic_algorithms_give_the_same_value_and_gradient(side: int) -> None:
    ((student, teacher),) = map_pairs(1, (2, 3, side, side))
    student.requires_grad_()

    def value_and_gradient() -> list[Tensor]:
        loss = hcl([student], [teacher])
        return [loss.detach(), *torch.autograd.grad(loss, student)]

    usual = value_and_gradient()
    torch.use_deterministic_algorithms(True)
    try:
        deterministic = value_and_gradient()
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(deterministic, usual)


@pytest.mark.parametrize("side", [1, 5])
def test_nan_in_a_map_gives_nan(side: int) -> None:
    student = torch.full((1, 1, side, side), math.nan)
    assert hcl([student], [torch.zeros(1, 1, side, side)]).isnan()
