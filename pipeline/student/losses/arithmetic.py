"""Arithmetic that losses share: fp32 under autocast, finite logits, checks of shapes, means over labelled rows."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.core.errors import ModelError

# Sums over rows and classes of differences this large stay below fp32's 3.4e38.
_MAX_LOGIT = 1e30
# Squares of entries this large still sum within fp32 at any width.
_MAX_ENTRY = 1e15
MAX_SQUARED = 3e4
"""fp16 can represent the gradient of a squared difference up to this size, if two entries share it."""
MIN_NORM = 1e-4
"""A shorter embedding has no meaningful direction, and 1/norm would overflow an fp16 gradient."""


def no_autocast(tensor: Tensor) -> torch.autocast:
    """Disables autocast on the tensor's device: below fp32 eps terms and small differences would be lost."""
    return torch.autocast(tensor.device.type, enabled=False)


def finite_logits(logits_BK: Tensor) -> Tensor:
    """fp32 logits, clamped to ±1e30. Values and gradients within are unchanged."""
    return logits_BK.float().clamp(-_MAX_LOGIT, _MAX_LOGIT)


def finite_embedding(embedding_BD: Tensor) -> Tensor:
    """fp32 entries, clamped to ±1e15. Values and gradients within are unchanged."""
    return embedding_BD.float().clamp(-_MAX_ENTRY, _MAX_ENTRY)


def finite_pair(student_BK: Tensor, teacher_BK: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of both sides in fp32; no gradient flows to the teacher.

    Raises:
        ModelError: the shapes differ.
    """
    check_same_shape(
        student_BK,
        teacher_BK,
        of="logits",
        expected="one shape [B,K]: the same rows and classes",
        next_step="set data.num_classes to the teacher's K, which the student's head takes",
    )
    return finite_logits(student_BK), finite_logits(teacher_BK.detach())


def check_same_shape(student: Tensor, teacher: Tensor, *, of: str, expected: str, next_step: str | None = None) -> None:
    """Torch would broadcast a side with one row or one class.

    Raises:
        ModelError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ModelError(
            f"the {of} of student and teacher differ in shape",
            code="loss.shapes-differ",
            where=f"{of} of one batch",
            got=f"student {list(student.shape)}, teacher {list(teacher.shape)}",
            expected=expected,
            next_step=next_step,
        )


def row_mean(loss_B: Tensor) -> Tensor:
    """0 for a batch of no rows, on the graph."""
    return loss_B.sum() / max(len(loss_B), 1)


def is_labelled(labels_B: Tensor, mixed_labels_B: Tensor | None) -> Tensor:
    """bool ``[B]``: which rows have a label (not -1). With mixing, the label of the partner is needed too."""
    labelled_B = labels_B >= 0
    return labelled_B if mixed_labels_B is None else labelled_B & (mixed_labels_B >= 0)


def labelled_mean(loss_B: Tensor, labelled_B: Tensor) -> Tensor:
    """Mean of ``loss_B`` over the labelled rows; without any, a 0 on the graph, since DDP expects gradients."""
    return torch.where(labelled_B, loss_B, 0.0).sum() / labelled_B.sum().clamp_min(1)
