"""Losses on maps of logits, a softmax at each position: ce, kd, dist and cwd of semantic segmentation.

Maps of student and teacher may have different grids: the student's is brought to the teacher's (``to_grid``), which a
cache stores. Positions in whose centre the view shows no image never count. With ``aux_weight`` a network's auxiliary
head learns from the same target as its final one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.models.maps import at_centres, to_grid
from pipeline.student.losses.arithmetic import finite_logits, finite_pair, no_autocast
from pipeline.student.losses.dist import SumOverRanks, as_rows, dist_of_rows, total_over
from pipeline.student.losses.registry import register

# Far below any logit of ``finite_logits``, and finite: a row in which no position counts has a gradient of 0, not NaN.
_NEVER = -1e38


@register("ce", kind="map")
def ce_map(
    student_BKhw: Tensor,
    mask_BHW: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float = 0.0,
    aux_weight: float = 0.0,
    aux_BKhw: Tensor | None = None,
) -> Tensor:
    """Cross-entropy in nats at the size of the mask, mean over the pixels of the batch that have a class; 0 with zero
    gradient without any.

    Logits are upsampled bilinearly, with ``align_corners=False``.

    Args:
        student_BKhw: logits ``[B,K,h,w]`` of any floating type and size.
        mask_BHW: integers ``[B,H,W]``, a class or ``ignore_index`` for each pixel of the view.
        label_smoothing: share of the target spread evenly over the K classes, in ``[0, 1)``.
        aux_weight: factor of the same loss of ``aux_BKhw``, which is added.
        aux_BKhw: logits of the auxiliary head, of any h and w. Comes with ``aux_weight``.

    Returns:
        fp32 scalar.
    """
    with no_autocast(student_BKhw):
        is_counted_BHW = mask_BHW != ignore_index
        class_B1HW = torch.where(is_counted_BHW, mask_BHW, 0).long()[:, None]

        def of(logits_BKhw: Tensor) -> Tensor:
            size: list[int] = list(mask_BHW.shape[1:])
            logits_BKHW = functional.interpolate(finite_logits(logits_BKhw), size, mode="bilinear")
            log_probs_BKHW = logits_BKHW.log_softmax(dim=1)
            loss_BHW = -(1 - label_smoothing) * log_probs_BKHW.gather(1, class_B1HW)[:, 0]
            if label_smoothing:
                loss_BHW = loss_BHW - label_smoothing * log_probs_BKHW.mean(dim=1)
            return torch.where(is_counted_BHW, loss_BHW, 0.0).sum() / is_counted_BHW.sum().clamp_min(1)

        return _with_aux(of, student_BKhw, aux_weight, aux_BKhw)


@register("kd", kind="map")
def kd_map(
    student_BKhw: Tensor,
    teacher_BKhw: Tensor,
    visible_BHW: Tensor,
    *,
    temperature: float,
    aux_weight: float = 0.0,
    aux_BKhw: Tensor | None = None,
) -> Tensor:
    """``T² · KL(softmax(teacher/T) ‖ softmax(student/T))`` in nats at each counted position of the teacher's grid, mean
    over those of a row, then over rows; 0 for a batch of no rows.

    Args:
        student_BKhw: logits ``[B,K,h,w]`` of any floating type and size.
        teacher_BKhw: logits of any h and w; no gradient flows to them.
        visible_BHW: bool, the pixels of the view that show the image.
        temperature: T > 0, the same for both sides.
        aux_weight, aux_BKhw: as of ``ce_map``.

    Returns:
        fp32 scalar.

    Raises:
        ModelError: the two sides have other rows or classes.
    """
    with no_autocast(student_BKhw):
        counted_Bhw = at_centres(visible_BHW, _grid(teacher_BKhw))

        def of(logits_BKhw: Tensor) -> Tensor:
            student_BKhw, target_BKhw = _on_one_grid(logits_BKhw, teacher_BKhw)
            student_log_BKhw = (student_BKhw / temperature).log_softmax(dim=1)
            teacher_log_BKhw = (target_BKhw / temperature).log_softmax(dim=1)
            kl_BKhw = functional.kl_div(student_log_BKhw, teacher_log_BKhw, reduction="none", log_target=True)
            kl_Bhw = torch.where(counted_Bhw, kl_BKhw.sum(dim=1), 0.0)
            mean_B = kl_Bhw.sum(dim=(1, 2)) / counted_Bhw.sum(dim=(1, 2)).clamp_min(1)
            return temperature**2 * mean_B.sum() / max(len(mean_B), 1)

        return _with_aux(of, student_BKhw, aux_weight, aux_BKhw)


@register("dist", kind="map")
def dist_map(
    student_BKhw: Tensor,
    teacher_BKhw: Tensor,
    visible_BHW: Tensor,
    *,
    temperature: float,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    gather: bool = False,
    sum_over_ranks: SumOverRanks | None = None,
    aux_weight: float = 0.0,
    aux_BKhw: Tensor | None = None,
) -> Tensor:
    """``dist`` whose rows are the counted positions of the teacher's grid in all rows of the batch (Huang 2022, sec.
    4.4). The paper's code compares the auxiliary heads of student and teacher with each other; here both heads of the
    student have the teacher's final logits, since these are what a cache has.

    Args:
        student_BKhw: logits ``[B,K,h,w]`` of any floating type and size.
        teacher_BKhw: logits of any h and w; no gradient flows to them.
        visible_BHW: bool, the pixels of the view that show the image.
        aux_weight, aux_BKhw: as of ``ce_map``. The other arguments are those of ``dist``.

    Returns:
        fp32 scalar.

    Raises:
        ModelError: the two sides have other rows or classes.
    """
    with no_autocast(student_BKhw):
        counted_Bhw = at_centres(visible_BHW, _grid(teacher_BKhw))

        def of(logits_BKhw: Tensor) -> Tensor:
            return dist_of_rows(
                *map(as_rows, _on_one_grid(logits_BKhw, teacher_BKhw)),
                temperature=temperature,
                inter_weight=inter_weight,
                intra_weight=intra_weight,
                total=total_over(sum_over_ranks, gather=gather),
                counted_B=counted_Bhw.flatten(),
            )

        return _with_aux(of, student_BKhw, aux_weight, aux_BKhw)


@register("cwd", kind="map")
def cwd(
    student_BKhw: Tensor,
    teacher_BKhw: Tensor,
    visible_BHW: Tensor,
    *,
    temperature: float,
    aux_weight: float = 0.0,
    aux_BKhw: Tensor | None = None,
) -> Tensor:
    """Channel-wise distillation (Shu 2021, 2011.13256): ``T² / (B·K) · Σ KL`` in nats, where the probabilities of a
    class are the softmax of its logits over T over the counted positions of a row; 0 for a batch of no rows.

    Args:
        student_BKhw: logits ``[B,K,h,w]`` of any floating type and size.
        teacher_BKhw: logits of any h and w; no gradient flows to them.
        visible_BHW: bool, the pixels of the view that show the image.
        temperature: T > 0, the same for both sides.
        aux_weight, aux_BKhw: as of ``ce_map``.

    Returns:
        fp32 scalar.

    Raises:
        ModelError: the two sides have other rows or classes.
    """
    with no_autocast(student_BKhw):
        counted_B1P = at_centres(visible_BHW, _grid(teacher_BKhw)).flatten(1)[:, None]

        def of(logits_BKhw: Tensor) -> Tensor:
            student_BKhw, target_BKhw = _on_one_grid(logits_BKhw, teacher_BKhw)
            student_log_BKP, teacher_log_BKP = (
                (map_BKhw.flatten(2) / temperature).masked_fill(~counted_B1P, _NEVER).log_softmax(dim=2)
                for map_BKhw in (student_BKhw, target_BKhw)
            )
            kl_BKP = functional.kl_div(student_log_BKP, teacher_log_BKP, reduction="none", log_target=True)
            num_channels = len(kl_BKP) * kl_BKP.shape[1]
            return temperature**2 * kl_BKP.masked_fill(~counted_B1P, 0).sum() / max(num_channels, 1)

        return _with_aux(of, student_BKhw, aux_weight, aux_BKhw)


def _with_aux(
    loss: Callable[[Tensor], Tensor], student_BKhw: Tensor, aux_weight: float, aux_BKhw: Tensor | None
) -> Tensor:
    """The loss of the final logits, and with its weight that of the auxiliary ones."""
    if not aux_weight:
        return loss(student_BKhw)
    assert aux_BKhw is not None, "aux_BKhw comes with aux_weight"
    return loss(student_BKhw) + aux_weight * loss(aux_BKhw)


def _grid(map_BKhw: Tensor) -> tuple[int, int]:
    return map_BKhw.shape[2], map_BKhw.shape[3]


def _on_one_grid(student_BKhw: Tensor, teacher_BKhw: Tensor) -> tuple[Tensor, Tensor]:
    """Both in fp32 on the teacher's grid; no gradient flows to the teacher."""
    return finite_pair(to_grid(finite_logits(student_BKhw), _grid(teacher_BKhw)), teacher_BKhw)
