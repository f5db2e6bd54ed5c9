"""ND against hand numbers and a float64 loop."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.student.losses import ClassDirections, check_class_means
from pipeline.student.losses import nd as nd_of_directions
from tests.errors import raises
from tests.pipeline.student.losses.batches import (
    SEEDS,
    assert_equals_oracle,
    labelled_rows,
    law,
    mean_over,
    without_partners,
)
from tests.tolerances import ulps

MEANS_KD = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0], [math.nan, math.nan]])
E0 = torch.tensor([0.6, 0.8])
D = 4
NORM = D + 2
"""Operations of a norm: squares, D − 1 sums, a root."""


def nd(student_BD: Tensor, teacher_norm_B: Tensor, class_means_KD: Tensor, labels_B: Tensor, **mixed: Tensor) -> Tensor:
    return nd_of_directions(student_BD, teacher_norm_B, ClassDirections.of(class_means_KD), labels_B, **mixed)


def single_row(student: Tensor, teacher_norm: float, label: int = 0) -> tuple[float, Tensor]:
    """Value and gradient of one row."""
    student_BD = student[None].clone().requires_grad_()
    loss = nd(student_BD, torch.tensor([teacher_norm]), MEANS_KD, torch.tensor([label]))
    loss.backward()
    return loss.item(), student_BD.grad[0]


def random_rows(seed: int, num_rows: int) -> dict[str, Tensor]:
    """Six classes, of which two have no mean and one a zero mean; labels with some missing; lambdas."""
    generator = torch.Generator().manual_seed(seed)
    means_KD = torch.randn(6, 4, generator=generator)
    means_KD[2], means_KD[3:5] = 0, math.nan
    labels_B, mixed_B = torch.tensor([-1, 0, 1, 2, 5])[torch.randint(5, (2, num_rows), generator=generator)]
    return {
        "student_BD": torch.randn(num_rows, 4, generator=generator),
        "teacher_norm_B": 4 * torch.rand(num_rows, generator=generator),
        "class_means_KD": means_KD,
        "labels_B": labels_B,
        "mixed_labels_B": mixed_B,
        "lambda_B": 0.5 + torch.rand(num_rows, generator=generator) / 2,
    }


def oracle(student_BD: Tensor, batch: dict[str, Tensor]) -> Tensor:
    rows: list[Tensor] = []
    for row, labels in labelled_rows(batch):
        mean_D = torch.stack([share * batch["class_means_KD"][label].double() for label, share in labels]).sum(0)
        length = student_BD[row].norm().clamp_min(batch["teacher_norm_B"][row].double())
        loss = 1 - student_BD[row] @ mean_D / mean_D.norm() / length
        # Without a direction a row counts in the divisor alone.
        rows.append(loss if mean_D.any() else 0 * student_BD[row].sum())
    return mean_over(rows, student_BD)


def direction_error(batch: dict[str, Tensor]) -> float:
    """The largest error of a unit vector e along ``lambda * mean + (1 - lambda) * mixed_mean``.

    Norms, units, weights and products: 2 norms and 6 operations on the two parts, whose rounding weighs the more the
    more they cancel; then a norm and a division.
    """
    means_KD, lambda_B1 = batch["class_means_KD"].double(), batch["lambda_B"].double()[:, None]
    parts = (
        lambda_B1 * means_KD[batch["labels_B"].clamp_min(0)],
        (1 - lambda_B1) * means_KD[batch["mixed_labels_B"].clamp_min(0)],
    )
    cancelled_B = (parts[0].norm(dim=1) + parts[1].norm(dim=1)) / (parts[0] + parts[1]).norm(dim=1)
    return ulps(2 * NORM + 6, cancelled_B[cancelled_B.isfinite()].max().item() if cancelled_B.isfinite().any() else 1)


@law
@given(seed=SEEDS, num_rows=st.integers(1, 8), mixed=st.booleans())
def test_nd_equals_a_float64_loop_over_the_rows_with_each_label(seed: int, num_rows: int, mixed: bool) -> None:
    batch = random_rows(seed, num_rows)
    if not mixed:
        batch["mixed_labels_B"] = batch["labels_B"]
    of_direction = direction_error(batch)
    batch = batch if mixed else without_partners(batch)
    student_BD, teacher_norm_B = batch.pop("student_BD"), batch["teacher_norm_B"].double()
    student_norm_B = student_BD.double().norm(dim=1)
    # Where the norms are equal the gradient jumps; rounding may take the other side.
    assume(((student_norm_B / teacher_norm_B - 1).abs() > ulps(NORM)).all())
    shortest = torch.maximum(student_norm_B, teacher_norm_B).min().item()
    assert_equals_oracle(
        lambda student_BD: nd(student_BD, **batch),
        lambda student_BD: oracle(student_BD, batch),
        student_BD,
        # s·e / length is a sum of D products and a division; then the difference from 1 and the mean of values up to 2.
        value_error=of_direction + ulps(NORM + 2 * D + 1) + ulps(num_rows + 2, 2),
        # e, and (s·e) s / ‖s‖², each over the length: at most 2/length, where s·e has the error above.
        gradient_error=(2 * of_direction + ulps(3 * NORM + 2 * D + 8, 2))
        / shortest
        / max(len(labelled_rows(batch)), 1),
    )


@law
@given(seed=SEEDS, factor=st.sampled_from([0.25, 2.0, 1024.0]))
def test_nd_depends_on_directions_and_the_ratio_of_norms_alone(seed: int, factor: float) -> None:
    batch = random_rows(seed, 6)
    scaled = {**batch, "student_BD": factor * batch["student_BD"], "teacher_norm_B": factor * batch["teacher_norm_B"]}
    # Powers of two round nothing.
    assert torch.equal(nd(**scaled), nd(**batch))


@pytest.mark.parametrize(("length", "value"), [(10.0, 0.0), (5.0, 0.5), (0.0, 1.0), (20.0, 0.0), (-10.0, 2.0)])
def test_nd_of_a_student_along_its_class_mean_is_the_share_of_the_norm_it_lacks(length: float, value: float) -> None:
    assert single_row(length * E0, 10.0)[0] == pytest.approx(value, rel=0, abs=ulps(2 * (2 + 2) + 2 * 2 + 5))


@pytest.mark.parametrize("student", [[0.0, 0.0], [1.0, 0.0], [-2.0, 3.0]])
def test_below_the_teachers_norm_the_gradient_is_exactly_the_direction(student: list[float]) -> None:
    gradient = single_row(torch.tensor(student), 8.0)[1]
    assert torch.equal(gradient, -E0 / 8)


@pytest.mark.parametrize("teacher_norm", [5.0, 1.0, 0.0])
def test_from_the_teachers_norm_on_there_is_no_radial_gradient(teacher_norm: float) -> None:
    student = torch.tensor([5.0, 0.0])
    value, gradient = single_row(student, teacher_norm)
    assert value == pytest.approx(1 - 0.6, rel=0, abs=ulps(2 * (2 + 2) + 2 * 2 + 3))
    # 1 − cos falls fastest across s, at e's part across s over ‖s‖.
    assert gradient.tolist() == pytest.approx([0.0, -0.8 / 5], rel=0, abs=ulps(3 * (2 + 2) + 2 * 2 + 8, 2 / 5))


@pytest.mark.parametrize(
    ("student", "teacher_norm", "label"),
    [([1.0, 2.0], 3.0, 2), ([0.0, 0.0], 0.0, 0), ([1.0, 2.0], 3.0, 3), ([1.0, 2.0], 3.0, -1)],
    ids=["zero mean", "no embedding at all", "absent class", "no label"],
)
def test_a_row_without_a_direction_contributes_nothing(student: list[float], teacher_norm: float, label: int) -> None:
    value, gradient = single_row(torch.tensor(student), teacher_norm, label)
    assert value == 0
    assert torch.equal(gradient, torch.zeros(2))


def test_rows_without_a_direction_stay_in_the_divisor_and_rows_without_a_label_do_not() -> None:
    def value(labels: list[int]) -> float:
        return nd(torch.zeros(4, 2), torch.ones(4), MEANS_KD, torch.tensor(labels)).item()

    assert value([0, 1, 0, 2]) == 3 / 4
    assert value([0, 1, -1, 2]) == pytest.approx(2 / 3, rel=ulps(1))


def test_class_means_have_to_cover_the_labels_and_the_first_missing_classes_are_named() -> None:
    check_class_means(MEANS_KD, torch.tensor([4, 0, 1, 0]), where="a cache")
    with raises("cache.missing-class-means", where="a cache", got="1 without a mean: 3"):
        check_class_means(MEANS_KD, torch.tensor([4, 0, 0, 1]), where="a cache")
    many_KD = torch.ones(1000, 2)
    many_KD[100:] = math.nan
    with raises("cache.missing-class-means", got="900 without a mean: 100, 101, 102, 103, 104, …"):
        check_class_means(many_KD, torch.ones(1000, dtype=torch.int64), where="a cache")
    with raises("cache.class-means-of-other-classes", got="K = 4"):
        check_class_means(MEANS_KD, torch.ones(10, dtype=torch.int64), where="a cache")
