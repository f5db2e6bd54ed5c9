"""What every loss here shares: fp32 whatever surrounds it, logits that stay finite, means over labelled rows."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.core.errors import ModelError

# Sums over rows and classes of differences this large stay below fp32's 3.4e38.
_LARGEST_LOGIT = 1e30
# Squares of entries this large still sum within fp32 at any width.
_LARGEST_ENTRY = 1e15
SMALLEST_NORM = 1e-4
"""Below it an embedding has no direction worth learning, and 1/norm would overflow an fp16 gradient."""


def no_autocast(tensor: Tensor) -> torch.autocast:
    """Switches autocast off on the tensor's device: below fp32 the eps terms and small differences would be lost."""
    return torch.autocast(tensor.device.type, enabled=False)


def finite_logits(logits_BK: Tensor) -> Tensor:
    """fp32 logits, limited to ±1e30; nothing changes, nor any gradient, up to there."""
    return logits_BK.float().clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)


def finite_embedding(embedding_BD: Tensor) -> Tensor:
    """fp32 entries, limited to ±1e15; nothing changes, nor any gradient, up to there."""
    return embedding_BD.float().clamp(-_LARGEST_ENTRY, _LARGEST_ENTRY)


def finite_pair(student_BK: Tensor, teacher_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides' logits in fp32; no gradient flows to the teacher.

    Raises:
        ModelError: the shapes differ. Torch would broadcast a side of one row or one class without a word.
    """
    if student_BK.shape != teacher_BK.shape:
        raise ModelError(
            "student and teacher do not answer alike",
            code="loss.shapes-differ",
            where="logits of one batch",
            got=f"student {list(student_BK.shape)}, teacher {list(teacher_BK.shape)}",
            expected="one shape [B,K]: the same rows, the same classes",
            next_step="set data.num_classes to the teacher's K, which the student's head takes",
        )
    return finite_logits(student_BK), finite_logits(teacher_BK.detach())


def is_labelled(labels_B: Tensor, mixed_labels_B: Tensor | None) -> Tensor:
    """bool ``[B]``: which rows have a label (not -1), and under mixing their partner's too."""
    labelled_B = labels_B >= 0
    return labelled_B if mixed_labels_B is None else labelled_B & (mixed_labels_B >= 0)


def labelled_mean(loss_B: Tensor, labelled_B: Tensor) -> Tensor:
    """Mean of ``loss_B`` over the labelled rows; without any, a 0 that still hangs on the graph, for DDP's sake."""
    return torch.where(labelled_B, loss_B, 0.0).sum() / labelled_B.sum().clamp_min(1)
