"""Losses on embeddings against hand numbers, float64 loops and the gradients that their formulas have."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.errors import ModelError
from pipeline.student.losses import cosine, mse, sifn

# A loaded machine is no finding.
law = settings(deadline=None, max_examples=40)
SEEDS = st.integers(0, 2**32 - 1)
rows = st.integers(1, 6)


def draw(seed: int, num_rows: int) -> tuple[Tensor, Tensor]:
    student_BD, teacher_BD = 4 * torch.randn(2, num_rows, 5, generator=torch.Generator().manual_seed(seed))
    return student_BD.requires_grad_(), teacher_BD


def exact(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().double().numpy() for tensor in tensors]


def test_cosine_gives_the_values_by_hand() -> None:
    teacher_BD = torch.tensor([[3.0, 4.0]]).expand(4, 2)
    student_BD = torch.tensor([[6.0, 8.0], [-3.0, -4.0], [4.0, -3.0], [5.0, 0.0]])
    values = [cosine(student_BD[row : row + 1], teacher_BD[:1]).item() for row in range(4)]
    assert values == pytest.approx([0, 2, 1, 0.4], abs=1e-6)
    assert cosine(student_BD, teacher_BD).item() == pytest.approx(3.4 / 4, abs=1e-6)


@law
@given(seed=SEEDS, num_rows=rows)
def test_cosine_equals_a_float64_loop_with_its_closed_form_gradient(seed: int, num_rows: int) -> None:
    student_BD, teacher_BD = draw(seed, num_rows)
    loss = cosine(student_BD, teacher_BD)
    loss.backward()
    value, gradient_BD = 0.0, np.zeros((num_rows, 5))
    for row, (s, t) in enumerate(zip(*exact(student_BD, teacher_BD), strict=True)):
        s_norm, t_norm = math.sqrt(s @ s), math.sqrt(t @ t)
        cos = s @ t / (s_norm * t_norm)
        value += (1 - cos) / num_rows
        gradient_BD[row] = -(t / t_norm - cos * s / s_norm) / s_norm / num_rows
    assert loss.item() == pytest.approx(value, abs=1e-6)
    np.testing.assert_allclose(student_BD.grad, gradient_BD, atol=1e-6)


@law
@given(seed=SEEDS, factor=st.sampled_from([0.25, 3.0, 1024.0]))
def test_cosine_ignores_the_length_of_either_side(seed: int, factor: float) -> None:
    student_BD, teacher_BD = draw(seed, 4)
    torch.testing.assert_close(cosine(factor * student_BD, teacher_BD / factor), cosine(student_BD, teacher_BD))


def test_an_embedding_without_direction_has_cosine_zero_and_a_bounded_gradient() -> None:
    student_BD = torch.zeros(1, 2, requires_grad=True)
    loss = cosine(student_BD, torch.tensor([[3.0, 4.0]]))
    loss.backward()
    assert loss.item() == 1
    assert student_BD.grad.norm() == pytest.approx(1e4, rel=1e-5)
    assert cosine(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)).item() == 1


def test_mse_gives_the_value_by_hand() -> None:
    assert mse(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 1.0], [0.0, 1.0]])).item() == 6 / 4


@law
@given(seed=SEEDS, num_rows=rows)
def test_mse_equals_a_float64_mean_with_its_closed_form_gradient(seed: int, num_rows: int) -> None:
    student_BD, teacher_BD = draw(seed, num_rows)
    loss = mse(student_BD, teacher_BD)
    loss.backward()
    student, teacher = exact(student_BD, teacher_BD)
    assert loss.item() == pytest.approx(np.mean((student - teacher) ** 2), rel=1e-5)
    np.testing.assert_allclose(student_BD.grad, 2 * (student - teacher) / student.size, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [cosine, mse])
def test_embeddings_of_different_widths_are_refused(loss: type) -> None:
    with pytest.raises(ModelError, match=r"student \[2, 3\], teacher \[2, 4\]"):
        loss(torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize("loss", [cosine, mse])
def test_no_gradient_reaches_the_teachers_embedding(loss: type) -> None:
    student_BD, teacher_BD = draw(0, 3)
    loss(student_BD, teacher_BD.requires_grad_()).backward()
    assert teacher_BD.grad is None


@law
@given(seed=SEEDS, num_rows=rows, increase=st.sampled_from([0.01, 1.0, 5.0]))
def test_sifn_is_the_increase_squared_and_pushes_every_row_outwards(seed: int, num_rows: int, increase: float) -> None:
    student_BD, _ = draw(seed, num_rows)
    loss = sifn(student_BD, increase=increase)
    loss.backward()
    assert loss.item() == pytest.approx(increase**2, rel=1e-6)
    (student,) = exact(student_BD)
    unit_BD = student / np.sqrt((student**2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(student_BD.grad, -2 * increase * unit_BD / num_rows, rtol=1e-4, atol=1e-7)


def test_sifn_keeps_a_small_increase_beside_a_large_norm() -> None:
    embedding_BD = torch.tensor([[3e9, 4e9]], requires_grad=True)
    loss = sifn(embedding_BD, increase=0.5)
    loss.backward()
    assert loss.item() == 0.25
    assert embedding_BD.grad[0].tolist() == pytest.approx([-0.6, -0.8])


def test_a_zero_row_does_not_grow() -> None:
    embedding_BD = torch.zeros(2, 3, requires_grad=True)
    sifn(embedding_BD).backward()
    assert torch.equal(embedding_BD.grad, torch.zeros(2, 3))
