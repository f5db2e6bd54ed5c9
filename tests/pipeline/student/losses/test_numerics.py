"""What every loss promises alike: fp32 inside, finite on any input, and never a look at values on the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pipeline.student.losses import ClassDirections, ce, cosine, dist, dkd, hard, hcl, kd, mse, nd, sifn
from tests.marks import slow

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Every loss as a function of student, teacher and labels; those on embeddings or maps take the logits for such.
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ce": lambda student, _teacher, labels: ce(student, labels),
    "ce_smoothed": lambda student, _teacher, labels: ce(student, labels, label_smoothing=0.1),
    "ce_mixed": lambda student, teacher, labels: ce(
        student, labels, mixed_labels_B=labels.flip(0), lambda_B=torch.full_like(teacher[:, 0], 0.75)
    ),
    "kd_1": lambda student, teacher, _labels: kd(student, teacher, temperature=1.0),
    "kd_20": lambda student, teacher, _labels: kd(student, teacher, temperature=20.0),
    "dist_1": lambda student, teacher, _labels: dist(student, teacher, temperature=1.0),
    "dist_4": lambda student, teacher, _labels: dist(student, teacher, temperature=4.0),
    "review_kd": lambda student, teacher, _labels: hcl(maps(student), maps(teacher)),
    "dist_gathered": lambda student, teacher, _labels: dist(
        student, teacher, temperature=1.0, gather=True, sum_over_ranks=lambda sums: sums
    ),
    "dkd_4": lambda student, teacher, labels: dkd(student, teacher, labels, temperature=4.0),
    "dkd_mixed": lambda student, teacher, labels: dkd(
        student,
        teacher,
        labels,
        temperature=1.0,
        mixed_labels_B=labels.flip(0),
        lambda_B=torch.full_like(teacher[:, 0], 0.75),
    ),
    "hard": lambda student, teacher, _labels: hard(student, teacher),
    "cosine": lambda student, teacher, _labels: cosine(student, teacher),
    "mse": lambda student, teacher, _labels: mse(student, teacher),
    "sifn": lambda student, _teacher, _labels: sifn(student),
    "nd": lambda student, teacher, labels: nd(
        student, teacher.float().norm(dim=1), ClassDirections.of(class_means(student)), labels
    ),
}
losses = pytest.mark.parametrize("name", LOSSES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def class_means(student_BD: Tensor) -> Tensor:
    """Means of three classes as wide as the student: one usual, one zero, one absent."""
    return torch.tensor([[1.0], [0.0], [math.nan]]).expand(3, student_BD.shape[1])


def maps(logits_BK: Tensor) -> list[Tensor]:
    """Two levels of 5×5 positions and of one, whose entries are these numbers."""
    level_BK11 = logits_BK[:, :, None, None]
    # Powers of two, so that making the maps rounds nothing.
    return [level_BK11 * torch.tensor([-1, 0.5, 1, 0.25, 0]).expand(5, 5).to(logits_BK), level_BK11]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    student_BK, teacher_BK = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return student_BK, teacher_BK


def labels(num_rows: int) -> Tensor:
    """0, 1, none, 0, 1, none, …"""
    return torch.tensor([0, 1, -1])[torch.arange(num_rows) % 3]


def extremes(dtype: torch.dtype, num_rows: int, num_classes: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of student and teacher at the ends of the type: zero, tiny, saturated, the largest finite number."""
    student_BK, teacher_BK = draw(num_rows, num_classes, dtype=dtype)
    zero_BK, top, tiny = torch.zeros_like(student_BK), torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    ends_BK = [zero_BK, tiny * student_BK.sign(), student_BK, 1e4 * student_BK]
    ends_BK += [min(top, 1e30) * student_BK.sign(), top * student_BK.sign(), torch.full_like(student_BK, top)]
    return [(s, t) for s in ends_BK for t in (zero_BK, teacher_BK, ends_BK[4], ends_BK[5], s)]


@losses
@dtypes
@pytest.mark.parametrize(("num_rows", "num_classes"), [(8, 10), (1, 10), (8, 2), (1, 2), slow(64, 300)])
def test_value_and_gradient_are_finite_at_the_ends_of_every_type(
    name: str, dtype: torch.dtype, num_rows: int, num_classes: int
) -> None:
    for student_BK, teacher_BK in extremes(dtype, num_rows, num_classes):
        student_BK = student_BK.clone().requires_grad_()
        loss = LOSSES[name](student_BK, teacher_BK, labels(num_rows))
        loss.backward()
        assert loss.shape == ()
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert student_BK.grad.isfinite().all()


@losses
def test_a_batch_of_no_rows_costs_nothing_and_stays_on_the_graph(name: str) -> None:
    student_BK = torch.zeros(0, 10, requires_grad=True)
    loss = LOSSES[name](student_BK, torch.zeros(0, 10), labels(0))
    loss.backward()
    assert loss.item() == 0
    assert student_BK.grad.shape == (0, 10)


@losses
@dtypes
def test_half_precision_costs_only_the_rounding_of_the_input(name: str, dtype: torch.dtype) -> None:
    student_BK, teacher_BK = draw(16, 10, dtype=dtype)
    loss = LOSSES[name](student_BK, teacher_BK, labels(16))
    assert torch.equal(loss, LOSSES[name](student_BK.float(), teacher_BK.float(), labels(16)))


@losses
def test_an_enclosing_autocast_changes_nothing(name: str) -> None:
    def value_and_gradient() -> tuple[Tensor, Tensor]:
        student_BK, teacher_BK = draw(16, 10)
        loss = LOSSES[name](student_BK.requires_grad_(), teacher_BK, labels(16))
        return loss.detach(), torch.autograd.grad(loss, student_BK)[0]

    plain = value_and_gradient()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = value_and_gradient()
    assert torch.equal(cast[0], plain[0])
    assert torch.equal(cast[1], plain[1])


class AutocastWatch(TorchFunctionMode):
    """Notes for every operation by name whether autocast was on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, bool]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add((func.__name__, torch.is_autocast_enabled("cpu")))
        return func(*args, **(kwargs or {}))


@losses
def test_autocast_is_off_for_the_arithmetic_of_a_loss(name: str) -> None:
    # What the table above does to its arguments is not among these.
    arithmetic = {"clamp", "softmax", "log_softmax", "kl_div", "linalg_vector_norm", "lerp", "mean", "sum"}
    arithmetic |= {"logsumexp", "cosine_similarity", "mse_loss", "square", "linalg_vecdot"}
    with torch.autocast("cpu", dtype=torch.bfloat16), AutocastWatch() as watch:
        LOSSES[name](*draw(16, 10), labels(16))
    seen = {(operation, on) for operation, on in watch.seen if operation in arithmetic}
    assert len(seen) >= 3
    assert not any(on for _, on in seen)


# vmap has no batching rule for kl_div and says that its fallback, a loop on the host, is slower.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@losses
def test_no_loss_looks_at_values_on_the_host(name: str) -> None:
    # vmap has no single value to hand to .item() or to a branch, and raises where one is asked for.
    student_VBK, teacher_VBK = draw(3, 6, 10)
    labels_VB = labels(6).expand(3, 6)
    losses_V = torch.func.vmap(LOSSES[name])(student_VBK, teacher_VBK, labels_VB)
    one_by_one = [LOSSES[name](*batch) for batch in zip(student_VBK, teacher_VBK, labels_VB, strict=True)]
    torch.testing.assert_close(losses_V, torch.stack(one_by_one))
