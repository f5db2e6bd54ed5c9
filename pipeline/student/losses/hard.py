"""Hard distillation: the class that the teacher predicts is the label."""

from __future__ import annotations

from torch import Tensor

from pipeline.student.losses.arithmetic import finite_pair, no_autocast
from pipeline.student.losses.ce import ce
from pipeline.student.losses.registry import register


@register("hard")
def hard(student_BK: Tensor, teacher_BK: Tensor) -> Tensor:
    """Cross-entropy in nats against the teacher's argmax, mean over the rows; 0 for a batch of no rows.

    The hard distillation of DeiT (Touvron 2021, 2012.12877, sec. 4). Of equal logits the first class counts. On mixed
    views the teacher predicts the mixed pixels.

    Args:
        student_BK: logits ``[B,K]`` of any floating type and size.
        teacher_BK: logits ``[B,K]``; no gradient flows to them.

    Returns:
        fp32 scalar.

    Raises:
        ModelError: the two shapes differ.
    """
    with no_autocast(student_BK):
        student_BK, teacher_BK = finite_pair(student_BK, teacher_BK)
        return ce(student_BK, teacher_BK.argmax(dim=1))
