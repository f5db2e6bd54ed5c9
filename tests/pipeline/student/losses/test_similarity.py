"""Similarities within a batch against a float64 loop over pairs of rows, and over ranks against the global batch."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.student.distributed import DistributedContext
from pipeline.student.losses import CompositeLoss, TeacherInputs, similarity
from pipeline.tasks.classification import Classification
from schemas.config import Config, LossConfig
from tests.errors import raises
from tests.pipeline.student.losses.batches import (
    SEEDS,
    assert_equals_oracle,
    batch_share,
    law,
    loss_inputs,
    random_pair,
    teacher_outputs,
)
from tests.ranks import group, run_two_ranks
from tests.tolerances import log_softmax_error, reordered, ulps

TEMPERATURES = {"student_temperature": 0.5, "teacher_temperature": 0.25}
loss_of = functools.partial(similarity, student_temperature=0.5, teacher_temperature=0.25)


def oracle(student_BD: Tensor, teacher_BD: Tensor, *, student_temperature: float, teacher_temperature: float) -> Tensor:
    """KL of the distributions over the other rows, one pair of rows after the other."""

    def log_probs(rows_BD: Tensor, row: int, temperature: float) -> list[Tensor]:
        a = rows_BD[row]
        others = [b for number, b in enumerate(rows_BD) if number != row]
        exponents = [(a @ b) / ((a @ a).sqrt() * (b @ b).sqrt()) / temperature for b in others]
        total = functools.reduce(torch.add, [value.exp() for value in exponents]).log()
        return [value - total for value in exponents]

    losses: list[Tensor] = []
    for row in range(len(student_BD)):
        log_q = log_probs(student_BD, row, student_temperature)
        log_p = log_probs(teacher_BD.double(), row, teacher_temperature)
        losses.append(functools.reduce(torch.add, [p.exp() * (p - q) for p, q in zip(log_p, log_q, strict=True)]))
    return torch.stack(losses).mean()


def test_similarity_gives_the_value_by_hand() -> None:
    """Three rows: the teacher's first two are equal and the third is opposite, the student's are all equal."""
    teacher_BD = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]])
    # For the first two rows p = (1, e^-2)/(1 + e^-2) at T = 1, for the third (1/2, 1/2); q = (1/2, 1/2) always.
    p = 1 / (1 + math.exp(-2))
    expected = 2 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))) / 3
    value = similarity(torch.ones(3, 5), teacher_BD, student_temperature=1.0, teacher_temperature=1.0)
    # Cosines of width 5 and 2, two log-softmaxes of two numbers of at most 1, products and sums of 6.
    assert value.item() == pytest.approx(expected, rel=0, abs=ulps(3 * 5 + 5 + 2 * 8 + 9, 2.0))


@law
@given(seed=SEEDS, num_rows=st.integers(3, 7), factor=st.sampled_from([0.25, 1.0, 64.0]))
def test_similarity_equals_a_float64_loop_at_any_length_of_either_side(seed: int, num_rows: int, factor: float) -> None:
    student_BD, _ = random_pair(seed, num_rows, 5, scale=4.0)
    teacher_BD, _ = random_pair(seed + 1, num_rows, 9, scale=4.0)
    student_BD, teacher_BD = factor * student_BD, teacher_BD / factor

    # A cosine errs as in test_embedding, divided by T; in log_softmax it counts twice.
    errors = {
        temperature: log_softmax_error(torch.full((1, num_rows - 1), 1 / temperature))
        + 2 * ulps(3 * width + 6) / temperature
        for temperature, width in ((0.5, 5), (0.25, 9))
    }
    of_logs = max(errors.values())
    largest = 2 / 0.25 + math.log(num_rows)  # of log p - log q
    # The gradient by a cosine is (q - p) / (B T), the one of a cosine by a row at most 2 / ‖s‖; each row is in 2B of
    # them. Errors of both factors.
    shortest = student_BD.norm(dim=1).min().item()
    of_weights = (2 * of_logs + ulps(4)) / (num_rows * 0.5)
    of_rows = ulps(4 * 5 + 11 + 2 * num_rows) / (num_rows * 0.5)
    assert_equals_oracle(
        lambda student_BD: loss_of(student_BD, teacher_BD),
        lambda student_BD: oracle(student_BD, teacher_BD, **TEMPERATURES),
        student_BD,
        value_error=2 * of_logs + (of_logs + ulps(num_rows**2 + 4)) * largest,
        gradient_error=2 * num_rows * (of_weights + of_rows) * 2 / shortest,
    )


def test_equal_relations_have_loss_zero_at_equal_temperatures() -> None:
    teacher_BD, _ = random_pair(3, 6, 8)
    rotation_DD, _ = torch.linalg.qr(random_pair(4, 8, 8)[0])
    value = similarity(2 * teacher_BD @ rotation_DD, teacher_BD, student_temperature=0.5, teacher_temperature=0.5)
    error = log_softmax_error(torch.full((1, 5), 2.0)) + 2 * ulps(4 * 8 + 6) / 0.5
    assert value.item() == pytest.approx(0, abs=2 * error)


@pytest.mark.parametrize("num_rows", [1, 2])
def test_fewer_than_three_rows_have_no_relations(num_rows: int) -> None:
    student_BD, teacher_BD = random_pair(0, num_rows, 4)
    value = loss_of(student_BD.requires_grad_(), teacher_BD)
    assert value.item() == 0
    assert torch.equal(torch.autograd.grad(value, student_BD)[0], torch.zeros(num_rows, 4))


def test_other_rows_are_refused() -> None:
    with raises("loss.shapes-differ"):
        loss_of(torch.zeros(2, 4), torch.zeros(3, 4))


GATHERED: tuple[LossConfig, ...] = Config.model_validate(
    {"loss": [{"name": "mse"}, {"name": "similarity", **TEMPERATURES, "gather": True}]}
).loss
WIDTH, IN_FEATURES = 6, 4
# Even and uneven ranks, one row a rank, a rank without rows.
SPLITS = [[4, 4], [5, 2], [1, 1], [3, 0]]


def one_step(distributed: DistributedContext, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """The term and the gradient on this rank of a linear student, after DDP's mean over ranks."""
    rows = slice(sum(sizes[: distributed.rank]), sum(sizes[: distributed.rank + 1]))
    generator = torch.Generator().manual_seed(3)
    images_BF, teacher_BD = (
        torch.randn(sum(sizes), width, generator=generator)[rows] for width in (IN_FEATURES, WIDTH)
    )
    linear = nn.Linear(IN_FEATURES, WIDTH, bias=False)
    weight = nn.Parameter(torch.randn(WIDTH, IN_FEATURES, generator=generator))
    linear.weight = weight
    student: nn.Module = DistributedDataParallel(linear) if distributed.size > 1 else linear
    embedding_BD = student(images_BF)
    num = len(images_BF)
    total, values = CompositeLoss(GATHERED, Classification("cls", 10), where="a test")(
        loss_inputs(
            embedding_BD[:, :2],
            torch.zeros(num, dtype=torch.int64),
            embedding_BD=embedding_BD,
            teachers=(
                TeacherInputs(outputs=teacher_outputs({}, embedding_BD=teacher_BD), projected={"mse": embedding_BD}),
            ),
            sum_over_ranks=distributed.sum_with_gradient,
            join_over_ranks=distributed.join_with_gradient,
        ),
        batch_share(
            world_size=distributed.size,
            num_rows=num,
            num_rows_global=sum(sizes),
            num_labelled=num,
            num_labelled_global=sum(sizes),
        ),
        epoch=0,
    )
    total.backward()
    assert weight.grad is not None
    return values["similarity"], weight.grad


def save_steps(rendezvous: Path, rank: int) -> None:
    with group(rendezvous, rank) as distributed:
        torch.save([one_step(distributed, sizes) for sizes in SPLITS], rendezvous.with_name(f"rank-{rank}.pt"))


@pytest.mark.long
def test_gathered_similarity_has_value_and_gradient_of_the_global_batch(tmp_path: Path) -> None:
    run_two_ranks(save_steps, tmp_path)
    for number, sizes in enumerate(SPLITS):
        expected = one_step(DistributedContext(), [sum(sizes)])
        # Products over features, widths and rows, norms and softmaxes, forward and backward, at 1/T = 4.
        error = reordered(6 * (IN_FEATURES + WIDTH + sum(sizes)), 4 * max(1.0, expected[1].abs().max().item()))
        for rank in (0, 1):
            for got, wanted in zip(torch.load(tmp_path / f"rank-{rank}.pt")[number], expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=0, atol=error)
