"""The contract of all registered losses: fp32 inside, finite on any input, no value read on the host, checked input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.errors import raises
from tests.marks import slow
from tests.pipeline.student.losses.batches import FUNCTIONS, call, random_pair, takes

Variant = tuple[str, dict[str, Any]]
# Every registered loss with the defaults of its section, and these.
VARIANTS: dict[str, Variant] = {
    **{name: (name, {}) for name in sorted(FUNCTIONS)},
    "ce smoothed": ("ce", {"label_smoothing": 0.1}),
    "ce of a prior": ("ce", {"prior": "balanced", "log_prior_K": torch.tensor(-3.0)}),
    "ce mixed": ("ce", {"mixed": True}),
    "kd at T=1": ("kd", {"temperature": 1.0}),
    "kd at T=20": ("kd", {"temperature": 20.0}),
    "dist at T=4": ("dist", {"temperature": 4.0}),
    "dist gathered": ("dist", {"gather": True, "sum_over_ranks": lambda sums: sums}),
    "similarity gathered": ("similarity", {"gather": True, "join_over_ranks": lambda rows: rows}),
    "dkd mixed": ("dkd", {"temperature": 1.0, "mixed": True}),
    "nd mixed": ("nd", {"mixed": True}),
    "bce smoothed": ("bce multilabel", {"label_smoothing": 0.1}),
    "bce mixed": ("bce multilabel", {"mixed": True}),
    "ce map smoothed, with aux": ("ce map", {"label_smoothing": 0.1, "aux_weight": 0.4}),
    **{f"{name} map with aux": (f"{name} map", {"aux_weight": 0.4}) for name in ("kd", "dist", "cwd")},
    "dist map gathered": ("dist map", {"gather": True, "sum_over_ranks": lambda sums: sums}),
    "dist multilabel gathered": ("dist multilabel", {"gather": True, "sum_over_ranks": lambda sums: sums}),
}


def over(condition: Callable[[str], bool] = lambda _name: True) -> pytest.MarkDecorator:
    """The variants of the losses for which the condition holds."""
    chosen = {key: variant for key, variant in VARIANTS.items() if condition(variant[0])}
    return pytest.mark.parametrize("variant", chosen.values(), ids=chosen)


variants = over()


def loss_of(variant: Variant, student_BK: Tensor, teacher_BK: Tensor, labels_B: Tensor) -> Tensor:
    name, options = variant
    return call(name, student_BK, teacher_BK, labels_B, **options)


def labels(num_rows: int) -> Tensor:
    """0, 1, none, 0, 1, none, …"""
    return torch.tensor([0, 1, -1])[torch.arange(num_rows) % 3]


def half_pair(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
    student_BK, teacher_BK = random_pair(0, *shape)
    return student_BK.to(dtype), teacher_BK.to(dtype)


def extremes(dtype: torch.dtype, num_rows: int, num_classes: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of student and teacher at the limits of the type: zero, tiny, saturated, the largest finite number."""
    student_BK, teacher_BK = half_pair(dtype, num_rows, num_classes)
    zero_BK, top, tiny = torch.zeros_like(student_BK), torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    ends_BK = [zero_BK, tiny * student_BK.sign(), student_BK, 1e4 * student_BK]
    ends_BK += [min(top, 1e30) * student_BK.sign(), top * student_BK.sign(), torch.full_like(student_BK, top)]
    return [(s, t) for s in ends_BK for t in (zero_BK, teacher_BK, ends_BK[4], ends_BK[5], s)]


@variants
@pytest.mark.parametrize("dtype", [torch.float16, slow(torch.bfloat16), torch.float32], ids=str)
@pytest.mark.parametrize(("num_rows", "num_classes"), [(8, 10), slow(1, 10), slow(8, 2), (1, 2), slow(64, 300)])
def test_value_and_gradient_are_finite_at_the_limits_of_every_type(
    variant: Variant, dtype: torch.dtype, num_rows: int, num_classes: int
) -> None:
    for student_BK, teacher_BK in extremes(dtype, num_rows, num_classes):
        student_BK = student_BK.clone().requires_grad_()
        loss = loss_of(variant, student_BK, teacher_BK, labels(num_rows))
        loss.backward()
        assert loss.shape == ()
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert student_BK.grad.isfinite().all()


@variants
def test_a_batch_of_no_rows_has_loss_zero_on_the_graph(variant: Variant) -> None:
    student_BK = torch.zeros(0, 10, requires_grad=True)
    loss = loss_of(variant, student_BK, torch.zeros(0, 10), labels(0))
    loss.backward()
    assert loss.item() == 0
    assert student_BK.grad.shape == (0, 10)


@over(lambda name: takes(name, "labels_B", "targets_BK", "mask_BHW"))
def test_a_batch_without_labels_has_loss_zero_and_zero_gradient(variant: Variant) -> None:
    student_BK, teacher_BK = random_pair(0, 4, 5)
    loss = loss_of(variant, student_BK.requires_grad_(), teacher_BK, torch.full((4,), -1))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student_BK.grad, torch.zeros(4, 5))


@variants
def test_no_gradient_reaches_the_teacher(variant: Variant) -> None:
    student_BK, teacher_BK = (side_BK.requires_grad_() for side_BK in random_pair(0, 6, 10))
    loss_of(variant, student_BK, teacher_BK, labels(6)).backward()
    assert teacher_BK.grad is None
    assert student_BK.grad is not None


@variants
def test_a_loss_has_a_gradient_for_a_teacher_that_ran_in_inference_mode(variant: Variant) -> None:
    student_BK, _ = random_pair(0, 6, 10)
    with torch.inference_mode():
        teacher_BK = torch.ones(6, 10)
    loss_of(variant, student_BK.requires_grad_(), teacher_BK, labels(6)).backward()
    assert student_BK.grad is not None


@over(lambda name: name != "similarity" and takes(name, "teacher_BK", "teacher_BD", "teacher_maps", "teacher_BKhw"))
@pytest.mark.parametrize(("num_student", "num_teacher"), [(10, 100), (7, 1)], ids=["other width", "broadcastable"])
def test_student_and_teacher_of_different_shapes_are_refused(
    variant: Variant, num_student: int, num_teacher: int
) -> None:
    with raises("loss.shapes-differ") as caught:
        loss_of(variant, torch.zeros(2, num_student), torch.zeros(2, num_teacher), labels(2))
    student, teacher = str(caught.value.got).split(", teacher ")
    assert student.startswith(f"student [2, {num_student}")
    assert teacher.startswith(f"[2, {num_teacher}")


@pytest.mark.parametrize("name", [name for name in sorted(FUNCTIONS) if takes(name, "lambda_B")])
@pytest.mark.parametrize(
    "has_lambdas",
    [False, True],
    ids=["no lambdas", "no partners"],
)
def test_partners_and_lambdas_come_together(name: str, has_lambdas: bool) -> None:
    partners = "mixed_labels_B" if takes(name, "labels_B") else "mixed_targets_BK"
    mixed = {"lambda_B": torch.ones(2)} if has_lambdas else {partners: torch.zeros(2, 3, dtype=torch.int64)}
    with pytest.raises(AssertionError, match="come together"):
        call(name, torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2, dtype=torch.int64), **mixed)


@variants
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_costs_only_the_rounding_of_the_input(variant: Variant, dtype: torch.dtype) -> None:
    student_BK, teacher_BK = half_pair(dtype, 16, 10)
    loss = loss_of(variant, student_BK, teacher_BK, labels(16))
    assert torch.equal(loss, loss_of(variant, student_BK.float(), teacher_BK.float(), labels(16)))


class AutocastWatch(TorchFunctionMode):
    """Records for every operation by name whether autocast was enabled."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, bool]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add((func.__name__, torch.is_autocast_enabled("cpu")))
        return func(*args, **(kwargs or {}))


@variants
def test_an_enclosing_autocast_is_disabled_and_changes_nothing(variant: Variant) -> None:
    def value_and_gradient() -> tuple[Tensor, Tensor]:
        student_BK, teacher_BK = random_pair(0, 16, 10)
        loss = loss_of(variant, student_BK.requires_grad_(), teacher_BK, labels(16))
        return loss.detach(), torch.autograd.grad(loss, student_BK)[0]

    with torch.autocast("cpu", dtype=torch.bfloat16), AutocastWatch() as watch:
        under_autocast = value_and_gradient()
    plain = value_and_gradient()
    assert all(torch.equal(*pair) for pair in zip(under_autocast, plain, strict=True))
    # What `call` does to build arguments is not among these.
    arithmetic = {
        "clamp",
        "softmax",
        "log_softmax",
        "kl_div",
        "linalg_vector_norm",
        "lerp",
        "mean",
        "sum",
        "sigmoid",
        "log_sigmoid",
    }
    arithmetic |= {
        "logsumexp",
        "cosine_similarity",
        "mse_loss",
        "square",
        "linalg_vecdot",
        "binary_cross_entropy_with_logits",
    }
    seen = {(operation, enabled) for operation, enabled in watch.seen if operation in arithmetic}
    assert len(seen) >= 3
    assert not any(enabled for _, enabled in seen)


# vmap has no batching rule for kl_div and warns that its fallback, a loop on the host, is slower.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@variants
def test_no_loss_reads_a_value_on_the_host(variant: Variant) -> None:
    # vmap has no single value for .item() or for a branch, and raises if one is needed.
    student_VBK, teacher_VBK = random_pair(0, 3, 6, 10)
    labels_VB = labels(6).expand(3, 6)

    def loss(student_BK: Tensor, teacher_BK: Tensor, labels_B: Tensor) -> Tensor:
        return loss_of(variant, student_BK, teacher_BK, labels_B)

    losses_V = torch.func.vmap(loss)(student_VBK, teacher_VBK, labels_VB)
    expected = [loss(*batch) for batch in zip(student_VBK, teacher_VBK, labels_VB, strict=True)]
    torch.testing.assert_close(losses_V, torch.stack(expected))
