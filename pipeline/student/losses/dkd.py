"""DKD: decouples the target class from the other classes (Zhao 2022, 2203.08679)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pipeline.student.losses.arithmetic import finite_pair, is_labelled, labelled_mean, no_autocast
from pipeline.student.losses.registry import register


@register("dkd")
def dkd(
    student_BK: Tensor,
    teacher_BK: Tensor,
    labels_B: Tensor,
    *,
    temperature: float,
    alpha: float = 1.0,
    beta: float = 8.0,
    mixed_labels_B: Tensor | None = None,
    lambda_B: Tensor | None = None,
) -> Tensor:
    """``T² · (alpha · TCKD + beta · NCKD)`` in nats, mean over the labelled rows; 0 with zero gradient without any.

    TCKD is the KL between the two sides' probabilities of target and not target, NCKD the KL between their softmaxes
    over the other classes; both at T. The paper does not define the target of a mixed row. Here its loss is ``lambda``
    times that of its label plus ``1 - lambda`` times that of its partner's label, the expected loss of a label sampled
    with these probabilities. For equal labels, or lambda 1, this is the paper's loss. A mixed row counts only if it has
    both labels.

    Args:
        student_BK: logits ``[B,K]`` of any floating type and size.
        teacher_BK: logits ``[B,K]``; no gradient flows to them.
        labels_B: int64 ``[B]`` in ``[0, K)``; -1: no label.
        temperature: T > 0, the same for both sides.
        alpha: weight of TCKD.
        beta: weight of NCKD.
        mixed_labels_B: int64 ``[B]``, the labels of the mixup partners. Comes with ``lambda_B``.
        lambda_B: ``[B]``, the share of the row's image in its mixed pixels.

    Returns:
        fp32 scalar.

    Raises:
        ModelError: the shapes of the logits differ.
    """
    assert (mixed_labels_B is None) == (lambda_B is None), "mixed_labels_B and lambda_B come together"
    with no_autocast(student_BK):
        student_BK, teacher_BK = finite_pair(student_BK, teacher_BK)
        student_BK, teacher_BK = student_BK / temperature, teacher_BK / temperature
        loss_B = _row_losses(student_BK, teacher_BK, labels_B, alpha, beta)
        if mixed_labels_B is not None and lambda_B is not None:
            loss_B = _row_losses(student_BK, teacher_BK, mixed_labels_B, alpha, beta).lerp(loss_B, lambda_B.float())
        # T² keeps the gradient's scale against a label term when T changes (Hinton 2015, sec. 2).
        return temperature**2 * labelled_mean(loss_B, is_labelled(labels_B, mixed_labels_B))


def _row_losses(student_BK: Tensor, teacher_BK: Tensor, labels_B: Tensor, alpha: float, beta: float) -> Tensor:
    """``alpha · TCKD + beta · NCKD`` of each row, ``[B]``; of class 0 for rows without a label.

    Computed from the logsumexp of the other classes: the logarithm of a probability, or a constant subtracted from the
    target's logit, would give infinity or NaN for large logits.
    """
    labels_B1 = labels_B.clamp_min(0)[:, None]
    is_target_BK = torch.arange(student_BK.shape[1], device=labels_B.device) == labels_B1
    student_others_B1, teacher_others_B1 = (
        logits_BK.masked_fill(is_target_BK, -torch.inf).logsumexp(dim=1, keepdim=True)
        for logits_BK in (student_BK, teacher_BK)
    )
    student_log_BK, teacher_log_BK = student_BK - student_others_B1, teacher_BK - teacher_others_B1
    # For the target this difference is the log odds of its probability.
    tckd_B = _binary_kl(student_log_BK.gather(1, labels_B1)[:, 0], teacher_log_BK.gather(1, labels_B1)[:, 0])
    # Masked before the product: the odds of a saturated target overflow, and infinity times 0 is NaN.
    teacher_BK = teacher_log_BK.exp().masked_fill(is_target_BK, 0.0)
    nckd_B = (teacher_BK * (teacher_log_BK - student_log_BK)).sum(dim=1)
    return alpha * tckd_B + beta * nckd_B


def _binary_kl(student_odds_B: Tensor, teacher_odds_B: Tensor) -> Tensor:
    """``[B]``: KL between two Bernoulli distributions with these log odds."""
    target_B = teacher_odds_B.sigmoid() * (logsigmoid(teacher_odds_B) - logsigmoid(student_odds_B))
    rest_B = (-teacher_odds_B).sigmoid() * (logsigmoid(-teacher_odds_B) - logsigmoid(-student_odds_B))
    return target_B + rest_B
