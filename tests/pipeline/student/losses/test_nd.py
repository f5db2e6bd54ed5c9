"""ND against hand numbers, closed-form gradients and a float64 loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.student.losses import ClassDirections, check_class_means
from pipeline.student.losses import nd as nd_of_directions
from tests.errors import raises
from tests.pipeline.student.losses.batches import SEEDS, law
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


def oracle(batch: dict[str, Tensor]) -> tuple[float, np.ndarray]:
    """Value and closed-form gradient in float64, row by row."""
    rows = {name: tensor.double().numpy() for name, tensor in batch.items()}
    labels, mixed = batch["labels_B"].tolist(), batch["mixed_labels_B"].tolist()
    num = max(sum(a >= 0 and b >= 0 for a, b in zip(labels, mixed, strict=True)), 1)
    value, gradient_BD = 0.0, np.zeros_like(rows["student_BD"])
    for i, (label, mixed_label) in enumerate(zip(labels, mixed, strict=True)):
        if label < 0 or mixed_label < 0:
            continue
        share, student, teacher_norm = rows["lambda_B"][i], rows["student_BD"][i], rows["teacher_norm_B"][i]
        mean = share * rows["class_means_KD"][label] + (1 - share) * rows["class_means_KD"][mixed_label]
        if not np.any(mean):
            continue
        e, norm = mean / np.linalg.norm(mean), np.linalg.norm(student)
        value += (1 - student @ e / max(norm, teacher_norm)) / num
        radial = (student @ e) * student / norm**2 if norm >= teacher_norm else 0
        gradient_BD[i] = -(e - radial) / max(norm, teacher_norm) / num
    return value, gradient_BD


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
@given(seed=SEEDS, num_rows=st.integers(1, 8))
def test_nd_equals_a_float64_loop_over_rows_with_both_labels(seed: int, num_rows: int) -> None:
    batch = random_rows(seed, num_rows)
    student_norm_B, teacher_norm_B = batch["student_BD"].double().norm(dim=1), batch["teacher_norm_B"].double()
    # Where the norms are equal the gradient jumps; rounding may take the other side.
    assume(((student_norm_B / teacher_norm_B - 1).abs() > ulps(NORM)).all())
    value, gradient_BD = oracle(batch)
    batch["student_BD"].requires_grad_()
    loss = nd(**batch)
    loss.backward()
    of_direction = direction_error(batch)
    # s·e / length is a sum of D products and a division; then the difference from 1 and the mean of values up to 2.
    error = of_direction + ulps(NORM + 2 * D + 1) + ulps(num_rows + 2, 2)
    assert loss.item() == pytest.approx(value, rel=0, abs=error)
    # e, and (s·e) s / ‖s‖², each over the length: at most 2/length, where s·e has the error above.
    num_labelled = max(int(((batch["labels_B"] >= 0) & (batch["mixed_labels_B"] >= 0)).sum()), 1)
    shortest = torch.maximum(student_norm_B, teacher_norm_B).min().item()
    error = (2 * of_direction + ulps(3 * NORM + 2 * D + 8, 2)) / shortest / num_labelled
    np.testing.assert_allclose(batch["student_BD"].grad, gradient_BD, rtol=0, atol=error)


@law
@given(seed=SEEDS, num_rows=st.integers(1, 8))
def test_a_row_mixed_with_its_own_class_is_an_unmixed_row(seed: int, num_rows: int) -> None:
    batch = random_rows(seed, num_rows)
    batch["mixed_labels_B"] = batch["labels_B"]
    unmixed = {name: tensor for name, tensor in batch.items() if name not in ("mixed_labels_B", "lambda_B")}
    error = direction_error(batch) + 2 * (ulps(NORM + 2 * D + 1) + ulps(num_rows + 2, 2))
    assert nd(**batch).item() == pytest.approx(nd(**unmixed).item(), rel=0, abs=error)


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


def test_class_means_that_cover_the_labels_pass() -> None:
    check_class_means(MEANS_KD, torch.tensor([4, 0, 1, 0]), where="a cache")


def test_a_class_that_occurs_without_a_mean_is_named() -> None:
    with raises("cache.missing-class-means", where="s3://b/caches/r7", got="1 without a mean: 3"):
        check_class_means(MEANS_KD, torch.tensor([4, 0, 0, 1]), where="s3://b/caches/r7")


def test_only_the_first_few_of_many_missing_classes_are_named() -> None:
    means_KD = torch.ones(1000, 2)
    means_KD[100:] = math.nan
    with raises("cache.missing-class-means", got="900 without a mean: 100, 101, 102, 103, 104, …"):
        check_class_means(means_KD, torch.ones(1000, dtype=torch.int64), where="a cache")


def test_means_of_another_number_of_classes_are_refused() -> None:
    with raises("cache.class-means-of-other-classes", got="K = 4"):
        check_class_means(MEANS_KD, torch.ones(10, dtype=torch.int64), where="a cache")
