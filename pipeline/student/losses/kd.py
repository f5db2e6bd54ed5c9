"""Knowledge distillation (Hinton 2015, 1503.02531); function matching (Beyer 2022, 2106.05237) is this term alone."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from pipeline.student.losses.arithmetic import finite_pair, no_autocast
from pipeline.student.losses.registry import register


@register("kd", takes_samples=True)
def kd(student_BK: Tensor, teacher_BK: Tensor, *, temperature: float) -> Tensor:
    """``T² · KL(softmax(teacher/T) ‖ softmax(student/T))`` in nats, mean over the rows; 0 for a batch of no rows.

    Args:
        student_BK: logits ``[B,K]`` of any floating type and size.
        teacher_BK: logits ``[B,K]``; no gradient flows to them.
        temperature: T > 0, the same for both sides.

    Returns:
        fp32 scalar.

    Raises:
        ModelError: the two shapes differ.
    """
    with no_autocast(student_BK):
        student_BK, teacher_BK = finite_pair(student_BK, teacher_BK)
        student_log_BK = (student_BK / temperature).log_softmax(dim=1)
        teacher_log_BK = (teacher_BK / temperature).log_softmax(dim=1)
        total = functional.kl_div(student_log_BK, teacher_log_BK, reduction="sum", log_target=True)
        # T² keeps the gradient's scale relative to a label term when T changes (Hinton 2015, sec. 2).
        # A rank may have no rows in a short last step.
        return temperature**2 * total / max(len(student_BK), 1)
