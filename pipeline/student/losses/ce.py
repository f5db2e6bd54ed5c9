"""Cross-entropy against labels, with label smoothing and mixing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from pipeline.student.losses.arithmetic import finite_logits, is_labelled, labelled_mean, no_autocast
from pipeline.student.losses.registry import register


@register("ce")
def ce(
    student_BK: Tensor,
    labels_B: Tensor,
    *,
    label_smoothing: float = 0.0,
    prior: Literal["balanced"] | Mapping[str, float] | None = None,
    log_prior_K: Tensor | None = None,
    mixed_labels_B: Tensor | None = None,
    lambda_B: Tensor | None = None,
) -> Tensor:
    """Cross-entropy in nats, mean over the labelled rows; 0 with zero gradient when no row has a label.

    With mixing, a row's target is ``lambda * label + (1 - lambda) * mixed_label`` (mixup, Zhang 2017, 1710.09412), and
    the row counts only if it has both labels. Smoothing then spreads ``label_smoothing`` of the target evenly over the
    K classes (Szegedy 2015, 1512.00567, sec. 7).

    With ``prior``, ``tau * log_prior_K`` is added to the logits: a network trained with it and evaluated without it
    minimises the error averaged over classes instead of rows (logit adjustment, Menon 2020, 2007.07314, eq. 10;
    ``balanced`` is tau = 1, the balanced softmax of Ren 2020, 2007.10740).

    Args:
        student_BK: logits ``[B,K]`` of any floating type and size.
        labels_B: int64 ``[B]`` in ``[0, K)``; -1: no label.
        label_smoothing: share of the target to spread, in ``[0, 1)``.
        prior: ``balanced``, or ``{"tau": …}``; comes with ``log_prior_K``.
        log_prior_K: ``[K]``, logarithms of the classes' shares of the labels.
        mixed_labels_B: int64 ``[B]``, the labels of the mixup partners. Comes with ``lambda_B``.
        lambda_B: ``[B]``, the share of the row's image in its mixed pixels.

    Returns:
        fp32 scalar.
    """
    assert (mixed_labels_B is None) == (lambda_B is None), "mixed_labels_B and lambda_B come together"
    with no_autocast(student_BK):
        logits_BK = finite_logits(student_BK)
        if prior is not None:
            assert log_prior_K is not None, "log_prior_K comes with prior"
            logits_BK = logits_BK + (1.0 if prior == "balanced" else prior["tau"]) * log_prior_K
        log_probs_BK = logits_BK.log_softmax(dim=1)
        target_B = _target_log_prob(log_probs_BK, labels_B)
        if mixed_labels_B is not None and lambda_B is not None:
            target_B = _target_log_prob(log_probs_BK, mixed_labels_B).lerp(target_B, lambda_B.float())
        loss_B = -(1 - label_smoothing) * target_B - label_smoothing * log_probs_BK.mean(dim=1)
        return labelled_mean(loss_B, is_labelled(labels_B, mixed_labels_B))


def _target_log_prob(log_probs_BK: Tensor, labels_B: Tensor) -> Tensor:
    """``[B]``; of class 0 for rows without a label, which the mean leaves out."""
    return log_probs_BK.gather(1, labels_B.clamp_min(0)[:, None])[:, 0]
