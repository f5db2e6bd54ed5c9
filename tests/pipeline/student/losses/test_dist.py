"""DIST against the published values and the paper's formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.student.losses import dist
from tests.pipeline.student.losses.batches import SEEDS, assert_equals_oracle, law, random_pair
from tests.tolerances import log_softmax_error, ulps

STUDENT_BK = torch.tensor([[1.0, 2, 3], [0, 1, 0], [2, 0, 1]])
TEACHER_BK = torch.tensor([[1.0, 2, 4], [0, 2, 0], [3, 0, 1]])
TWO_CLASSES_BK = torch.tensor([[1.0, 0.0]])


def mean_relation(p_NM: Tensor, q_NM: Tensor) -> Tensor:
    p_NM, q_NM = p_NM - p_NM.mean(1, keepdim=True), q_NM - q_NM.mean(1, keepdim=True)
    return torch.mean((p_NM * q_NM).sum(1) / (p_NM.norm(dim=1) * q_NM.norm(dim=1) + 1e-8))


def oracle(
    student_BK: Tensor, teacher_BK: Tensor, *, temperature: float, inter_weight: float = 1, intra_weight: float = 1
) -> Tensor:
    """The formula, without a floor."""
    p_BK, q_BK = ((logits_BK.double() / temperature).softmax(1) for logits_BK in (student_BK, teacher_BK))
    inter, intra = 1 - mean_relation(p_BK, q_BK), 1 - mean_relation(p_BK.T, q_BK.T)
    return temperature**2 * (inter_weight * inter + intra_weight * intra)


FLOOR = 1e-3
"""Of the student's norm, in root-mean-square probabilities: the formula has none."""


def norms(logits_BK: Tensor, temperature: float, dim: int) -> tuple[Tensor, Tensor]:
    """Of the probabilities along ``dim``, and of their differences from the mean, in float64."""
    probs_BK = (logits_BK.detach().double() / temperature).softmax(dim=1)
    return probs_BK.norm(dim=dim), (probs_BK - probs_BK.mean(dim, keepdim=True)).norm(dim=dim)


def relation_errors(student_BK: Tensor, teacher_BK: Tensor, temperature: float, dim: int) -> Tensor:
    """The largest error of each correlation over n probabilities.

    A probability has the relative error of its logarithm; the mean of n and the difference from it round n + 2 times.
    That error grows by what the difference cancels. A correlation changes by no more than the two unit vectors do; its
    three sums of n products, roots, product and division are 3n + 6 operations.
    """
    size = student_BK.shape[dim]
    errors = torch.zeros(())
    for logits_BK, floor in ((student_BK, FLOOR), (teacher_BK, 0.0)):
        norm, centred_norm = norms(logits_BK, temperature, dim)
        length = torch.maximum(centred_norm, floor * norm / math.sqrt(size))
        errors = errors + (log_softmax_error(logits_BK / temperature) + ulps(size + 2)) * norm / length
    return (errors + ulps(3 * size + 6)).clamp_max(2)


def value_errors(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> tuple[float, float]:
    """Of inter and intra, times T²: means over rows and classes of values up to 2."""
    inter, intra = (
        relation_errors(student_BK, teacher_BK, temperature, dim).mean().item() + ulps(student_BK.shape[1 - dim] + 3, 2)
        for dim in (1, 0)
    )
    return temperature**2 * inter, temperature**2 * intra


@pytest.mark.parametrize(
    ("temperature", "inter", "intra", "total"),
    [(1.0, 0.010939, 0.012019, 0.022958), (4.0, 0.013933, 0.016898, 0.493296)],
)
def test_dist_gives_the_published_values(temperature: float, inter: float, intra: float, total: float) -> None:
    def value(inter_weight: float, intra_weight: float) -> float:
        return dist(
            STUDENT_BK, TEACHER_BK, temperature=temperature, inter_weight=inter_weight, intra_weight=intra_weight
        ).item()

    # The published numbers have six digits.
    of_inter, of_intra = value_errors(STUDENT_BK, TEACHER_BK, temperature)
    assert value(1, 1) == pytest.approx(total, rel=0, abs=of_inter + of_intra + 0.5e-6)
    assert value(1, 0) == pytest.approx(temperature**2 * inter, rel=0, abs=of_inter + 0.5e-6 * temperature**2)
    assert value(0, 1) == pytest.approx(temperature**2 * intra, rel=0, abs=of_intra + 0.5e-6 * temperature**2)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_of_equal_logits_is_zero(temperature: float) -> None:
    error = sum(value_errors(TEACHER_BK, TEACHER_BK, temperature))
    assert dist(TEACHER_BK, TEACHER_BK, temperature=temperature).item() == pytest.approx(0, abs=error)


@law
@given(seed=SEEDS, num_rows=st.integers(3, 6), num_classes=st.integers(3, 6), temperature=st.sampled_from([1.0, 4.0]))
def test_dist_equals_the_formula_in_float64(seed: int, num_rows: int, num_classes: int, temperature: float) -> None:
    student_BK, teacher_BK = random_pair(seed, num_rows, num_classes)
    keys = {"temperature": temperature, "inter_weight": 0.5, "intra_weight": 2.0}
    of_inter, of_intra = value_errors(student_BK, teacher_BK, temperature)
    # By a student's probability a correlation changes by a difference of two unit vectors over its norm; the chain rule
    # of softmax takes a difference of two of these, and T²/T and the means over B rows and K classes remain.
    gradient_error = 0.0
    for dim, weight in ((1, 0.5 / num_rows), (0, 2.0 / num_classes)):
        norm, centred_norm = norms(student_BK, temperature, dim)
        assume((centred_norm > 2 * FLOOR * norm).all())
        of_relation = (2 * relation_errors(student_BK, teacher_BK, temperature, dim) + ulps(25)) / centred_norm
        gradient_error += 2 * temperature * weight * of_relation.max().item()
    assert_equals_oracle(
        lambda student_BK: dist(student_BK, teacher_BK, **keys),
        lambda student_BK: oracle(student_BK, teacher_BK, **keys),
        student_BK,
        value_error=0.5 * of_inter + 2 * of_intra,
        gradient_error=gradient_error,
    )


@pytest.mark.parametrize("num_classes", [3, 10, 100, 1000])
@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0, 20.0])
def test_dist_stays_within_2e_4_of_the_formula_on_random_logits(num_classes: int, scale: float) -> None:
    for seed in range(5):
        student_BK, teacher_BK = (scale * logits_BK for logits_BK in random_pair(seed, 8, num_classes))
        assert_equals_oracle(
            lambda student_BK, teacher_BK=teacher_BK: dist(student_BK, teacher_BK, temperature=1.0),
            lambda student_BK, teacher_BK=teacher_BK: oracle(student_BK, teacher_BK, temperature=1.0),
            student_BK,
            value_error=2e-4,
            gradient_error=2e-4,
        )


@pytest.mark.parametrize("num_classes", [10, 100])
def test_logits_that_differ_by_thousandths_are_still_above_the_floor(num_classes: int) -> None:
    student_BK, teacher_BK = random_pair(0, 8, num_classes)
    exact_BK = (0.002 * student_BK).double().requires_grad_()
    (gradient_BK,) = torch.autograd.grad(oracle(exact_BK, teacher_BK, temperature=1.0), exact_BK)
    assert_equals_oracle(
        lambda student_BK: dist(student_BK, teacher_BK, temperature=1.0),
        lambda student_BK: oracle(student_BK, teacher_BK, temperature=1.0),
        0.002 * student_BK,
        value_error=2e-4,
        gradient_error=2e-3 * gradient_BK.abs().max().item(),
    )


@pytest.mark.parametrize("num_classes", [3, 10, 100, 1000])
@pytest.mark.parametrize("scale", [0.0, 1e-7, 1e-5, 1e-3])
def test_the_gradient_of_a_zero_initialised_head_is_bounded(num_classes: int, scale: float) -> None:
    for seed in range(5):
        student_BK, teacher_BK = random_pair(seed, 8, num_classes)
        student_BK = (scale * student_BK).requires_grad_()
        dist(student_BK, teacher_BK, temperature=1.0).backward()
        assert 1 < student_BK.grad.norm() <= 1e3


def test_one_row_has_no_relations_over_the_batch() -> None:
    student_BK = torch.tensor([[1.0, 2, 4]], requires_grad=True)
    intra = dist(student_BK, torch.tensor([[3.0, 0, 1]]), temperature=1.0, inter_weight=0.0)
    intra.backward()
    assert intra.item() == 1
    assert torch.equal(student_BK.grad, torch.zeros(1, 3))


def test_classes_absent_from_a_saturated_batch_keep_their_loss() -> None:
    logits_BK = 100 * torch.eye(100)[torch.arange(40) % 10]
    intra = dist(logits_BK, logits_BK, temperature=1.0, inter_weight=0.0)
    # 90 of 100 classes are absent; 1e-8 is added to norms of which the square is 3.6.
    assert intra.item() == pytest.approx(0.90, rel=0, abs=1e-8 + ulps(5 * 40 + 100))


def test_two_classes_agree_wholly_or_not_at_all() -> None:
    def inter(student: list[float]) -> float:
        return dist(torch.tensor([student]), TWO_CLASSES_BK, temperature=1.0, intra_weight=0.0).item()

    def error(student: list[float]) -> float:
        """1e-8 is added to a product of norms of at least 0.05."""
        return value_errors(torch.tensor([student]), TWO_CLASSES_BK, 1.0)[0] + 1e-8 / 0.05

    assert inter([5.0, 0.0]) == pytest.approx(0, abs=error([5.0, 0.0]))
    assert inter([0.0, 0.5]) == pytest.approx(2, rel=0, abs=error([0.0, 0.5]))


def test_every_pixel_of_a_segmentation_is_a_row() -> None:
    student_BK, teacher_BK = random_pair(1, 2 * 3 * 4, 5)
    student_BKHW, teacher_BKHW = (z.reshape(2, 3, 4, 5).permute(0, 3, 1, 2) for z in (student_BK, teacher_BK))
    torch.testing.assert_close(
        dist(student_BKHW, teacher_BKHW, temperature=1.0), dist(student_BK, teacher_BK, temperature=1.0)
    )
