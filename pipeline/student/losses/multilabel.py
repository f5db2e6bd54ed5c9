"""Losses of heads whose rows have any number of classes, each with a sigmoid: kd and bce.

Both sum over the labels of a row: labels are independent given the row, so these sums are the divergence and the
cross-entropy of its set of labels. The gradient at a logit then has the scale of that at a logit of a class head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.student.losses.arithmetic import finite_logits, finite_pair, labelled_mean, no_autocast
from pipeline.student.losses.registry import register


@register("kd", kind="multilabel")
def kd_multilabel(student_BK: Tensor, teacher_BK: Tensor, *, temperature: float) -> Tensor:
    """``T² · Σ_k KL(σ(teacher_k/T) ‖ σ(student_k/T))`` in nats, mean over the rows; 0 for a batch of no rows.

    The divergence of the labels' joint distribution. For a single label it is ``kd`` of two classes with the logits
    ``[z, 0]``. Evaluations show the mean over labels.

    Args:
        student_BK: a logit for each row and label, of any floating type and size.
        teacher_BK: logits of the same shape; no gradient flows to them.
        temperature: T > 0, the same for both sides.

    Returns:
        fp32 scalar.

    Raises:
        ModelError: the two shapes differ.
    """
    with no_autocast(student_BK):
        student_BK, teacher_BK = finite_pair(student_BK, teacher_BK)
        student_log, teacher_log = (_log_probs(logits_BK / temperature) for logits_BK in (student_BK, teacher_BK))
        total = functional.kl_div(student_log, teacher_log, reduction="sum", log_target=True)
        return temperature**2 * total / max(len(student_BK), 1)


@register("bce", kind="multilabel")
def bce(
    student_BK: Tensor,
    targets_BK: Tensor,
    *,
    label_smoothing: float = 0.0,
    mixed_targets_BK: Tensor | None = None,
    lambda_B: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy in nats, sum over labels, mean over the rows with labels; 0 with zero gradient without any.

    With mixing, the targets of a row are ``lambda * targets + (1 - lambda) * mixed_targets``, and the row counts only
    if both have labels. Smoothing then moves each target t to ``t · (1 − label_smoothing) + label_smoothing / 2``.

    Args:
        student_BK: a logit for each row and label, of any floating type and size.
        targets_BK: integers ``[B,K]``: 1 or 0; -1 in all of a row without labels.
        label_smoothing: share of the targets to spread over both outcomes of a label, in ``[0, 1)``.
        mixed_targets_BK: targets of the mixup partners. Comes with ``lambda_B``.
        lambda_B: ``[B]``, the share of the row's image in its mixed pixels.

    Returns:
        fp32 scalar.
    """
    assert (mixed_targets_BK is None) == (lambda_B is None), "mixed_targets_BK and lambda_B come together"
    assert student_BK.shape == targets_BK.shape, "one target for each logit"
    with no_autocast(student_BK):
        target_BK, labelled_B = targets_BK.float(), (targets_BK >= 0).all(dim=1)
        if mixed_targets_BK is not None and lambda_B is not None:
            target_BK = mixed_targets_BK.float().lerp(target_BK, lambda_B.float()[:, None])
            labelled_B = labelled_B & (mixed_targets_BK >= 0).all(dim=1)
        target_BK = target_BK.clamp_min(0) * (1 - label_smoothing) + label_smoothing / 2
        loss_BK = functional.binary_cross_entropy_with_logits(finite_logits(student_BK), target_BK, reduction="none")
        return labelled_mean(loss_BK.sum(dim=1), labelled_B)


def _log_probs(logits_BK: Tensor) -> Tensor:
    """``[2,B,K]``: of each label and of its absence."""
    return functional.logsigmoid(torch.stack([logits_BK, -logits_BK]))
