"""Random batches for tests of losses, and one way to call every registered loss."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, get_args

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.student.data.teacher_outputs import TeacherOutputs
from pipeline.student.losses import LOSSES, MAP_LOSSES, MULTILABEL_LOSSES, BatchShare, ClassDirections, LossInputs
from schemas.config import LossConfig

# No deadline: a loaded machine must not fail a test.
law = settings(deadline=None, max_examples=40)
SEEDS = st.integers(0, 2**32 - 1)


def random_pair(seed: int, *shape: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Normally distributed values of student and teacher."""
    student, teacher = scale * torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    return student, teacher


def random_batch(seed: int, num_rows: int, num_classes: int) -> dict[str, Tensor]:
    """Logits of both sides, labels and partners' labels of which some are missing, and lambdas."""
    generator = torch.Generator().manual_seed(seed)
    student_BK, teacher_BK = 3 * torch.randn(2, num_rows, num_classes, generator=generator)
    labels_B, mixed_labels_B = torch.randint(-1, num_classes, (2, num_rows), generator=generator)
    return {
        "student_BK": student_BK,
        "teacher_BK": teacher_BK,
        "labels_B": labels_B,
        "mixed_labels_B": mixed_labels_B,
        "lambda_B": 0.5 + torch.rand(num_rows, generator=generator) / 2,
    }


def without_partners(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in batch.items() if name not in ("mixed_labels_B", "lambda_B")}


def labelled_rows(batch: dict[str, Tensor]) -> list[tuple[int, list[tuple[int, float]]]]:
    """Of the rows that have each label: the row, and its labels with their shares, one label if nothing is mixed."""
    labels_B = batch["labels_B"].tolist()
    mixed_labels_B = batch["mixed_labels_B"].tolist() if "lambda_B" in batch else labels_B
    share_B = batch["lambda_B"].tolist() if "lambda_B" in batch else [1.0] * len(labels_B)
    rows = enumerate(zip(labels_B, mixed_labels_B, share_B, strict=True))
    return [(row, [(a, share), (b, 1 - share)]) for row, (a, b, share) in rows if min(a, b) >= 0]


def mean_over(rows: list[Tensor], student: Tensor) -> Tensor:
    """The mean of the rows' losses; 0 on the graph if there are none."""
    return torch.stack(rows).mean() if rows else 0 * student.sum()


def loss_inputs(
    student_BK: Tensor, labels_B: Tensor, *, embedding_BD: Tensor | None = None, **others: Any
) -> LossInputs:
    """Of classification: the student's logits and embedding, and labels."""
    embedding = {} if embedding_BD is None else {"embedding": embedding_BD}
    return LossInputs(outputs={"logits": student_BK, **embedding}, targets={"label": labels_B}, **others)


def teacher_outputs(
    logits: dict[float | None, Tensor],
    norm_B: Tensor | None = None,
    embedding_BD: Tensor | None = None,
    tokens_BPD: Tensor | None = None,
) -> TeacherOutputs:
    """Of classification, from logits by temperature."""
    others = {("embedding", None): embedding_BD, ("tokens", None): tokens_BPD}
    given = {key: value for key, value in others.items() if value is not None}
    return TeacherOutputs({**{("logits", key): value for key, value in logits.items()}, **given}, norm_B)


def batch_share(*, num_labelled: int | Tensor, num_labelled_global: int | Tensor, **others: Any) -> BatchShare:
    """Of classification, whose rows with a target are those with a label."""
    counts: dict[str, Any] = {
        "num_labelled": {"label": num_labelled},
        "num_labelled_global": {"label": num_labelled_global},
    }
    return BatchShare(**counts, **others)


Function = Callable[[Tensor], Tensor]


def assert_equals_oracle(
    loss: Function, oracle: Function, student: Tensor, *, value_error: float, gradient_error: float
) -> None:
    """The value of an fp32 loss of the student's outputs, and its gradient, are those of the oracle in float64."""
    exact = student.double().requires_grad_()
    student = student.clone().requires_grad_()
    value, expected = loss(student), oracle(exact)
    assert value.dtype == torch.float32
    assert abs(value.item() - expected.item()) <= value_error
    (gradient,), (expected_gradient,) = torch.autograd.grad(value, student), torch.autograd.grad(expected, exact)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=gradient_error)


def _class_directions(student_BD: Tensor) -> ClassDirections:
    """Of three classes: one with a usual mean, one with a zero mean, one without a mean."""
    return ClassDirections.of(torch.tensor([[1.0], [0.0], [math.nan]]).expand(3, student_BD.shape[1]))


def _targets(student_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Every label up to that of the row; none of a row without a label."""
    is_label_BK = torch.arange(student_BK.shape[1]) <= labels_B[:, None]
    return torch.where(labels_B[:, None] < 0, -1, is_label_BK.long())


def _maps(logits_BK: Tensor) -> list[Tensor]:
    """Two levels with these numbers, of 5×5 positions and of one."""
    level_BK11 = logits_BK[:, :, None, None]
    # Powers of two round nothing.
    return [level_BK11 * torch.tensor([-1, 0.5, 1, 0.25, 0]).expand(5, 5).to(logits_BK), level_BK11]


def _tokens(logits_BK: Tensor) -> Tensor:
    """Two positions with these numbers, one of them with the opposite sign."""
    return torch.stack([logits_BK, -logits_BK], dim=1)


def _map(logits_BK: Tensor) -> Tensor:
    """The logits at some of 2×3 positions; powers of two round nothing."""
    return logits_BK[:, :, None, None] * torch.tensor([[-1, 0.5, 1], [0.25, 0, 2**-3]]).to(logits_BK)


# By parameter, from logits of student and teacher; losses on embeddings, tokens or maps take the logits for these.
_INPUTS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "student_BK": lambda student, _teacher, _labels: student,
    "student_BD": lambda student, _teacher, _labels: student,
    "embedding_BD": lambda student, _teacher, _labels: student,
    "teacher_BK": lambda _student, teacher, _labels: teacher,
    "teacher_BD": lambda _student, teacher, _labels: teacher,
    "student_BPD": lambda student, _teacher, _labels: _tokens(student),
    "teacher_BPD": lambda _student, teacher, _labels: _tokens(teacher),
    "teacher_norm_B": lambda _student, teacher, _labels: teacher.float().norm(dim=1),
    "class_directions": lambda student, _teacher, _labels: _class_directions(student),
    "student_maps": lambda student, _teacher, _labels: _maps(student),
    "teacher_maps": lambda _student, teacher, _labels: _maps(teacher),
    "student_BKhw": lambda student, _teacher, _labels: _map(student),
    "aux_BKhw": lambda student, _teacher, _labels: _map(student).flip(2),
    "teacher_BKhw": lambda _student, teacher, _labels: _map(teacher).flip(3),
    "mask_BHW": lambda _student, _teacher, labels: labels[:, None, None].expand(len(labels), 4, 5),
    "visible_BHW": lambda _student, _teacher, labels: torch.arange(5).expand(len(labels), 4, 5) < 4,
    "ignore_index": lambda _student, _teacher, _labels: -1,
    "labels_B": lambda _student, _teacher, labels: labels,
    "targets_BK": lambda student, _teacher, labels: _targets(student, labels),
}

FUNCTIONS = {
    **LOSSES,
    **{f"{name} multilabel": loss for name, loss in MULTILABEL_LOSSES.items()},
    **{f"{name} map": loss for name, loss in MAP_LOSSES.items()},
}
"""All registered losses, with a name for each."""


def takes(name: str, *parameters: str) -> bool:
    """Whether the loss has one of these parameters."""
    return not inspect.signature(FUNCTIONS[name]).parameters.keys().isdisjoint(parameters)


def default_options(name: str) -> dict[str, Any]:
    """The keys of a loss with their defaults, from its config section."""
    union, _ = get_args(LossConfig)
    sections = {get_args(section.model_fields["name"].annotation)[0]: section for section in get_args(union)}
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    section = sections[name.removesuffix(" multilabel").removesuffix(" map")].model_construct()
    return {key: value for key, value in section.arguments.items() if key in parameters}


def call(
    name: str, student_BK: Tensor, teacher_BK: Tensor, labels_B: Tensor, *, mixed: bool = False, **options: Any
) -> Tensor:
    """The loss of this name on these logits; other inputs are derived from them."""
    inputs = {
        key: _INPUTS[key](student_BK, teacher_BK, labels_B)
        for key in inspect.signature(FUNCTIONS[name]).parameters
        if key in _INPUTS
    }
    if mixed:
        partners: dict[str, Any] = {
            f"mixed_{key}": inputs[key].flip(0) for key in ("labels_B", "targets_BK") if key in inputs
        }
        options |= {**partners, "lambda_B": torch.full_like(teacher_BK[:, 0], 0.75)}
    return FUNCTIONS[name](**inputs, **{**default_options(name), **options})
