"""HCL: the hierarchical context loss of ReviewKD (Chen 2021, 2104.09044, sec. 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d

from pipeline.student.losses.arithmetic import check_same_shape, no_autocast
from pipeline.student.losses.registry import register

_POOLED_SIDES = (4, 2, 1)
# Squares of differences this large, times the entries of a row, stay below fp32's 3.4e38.
_MAX_DIFFERENCE = 1e15


@register("review_kd")
def hcl(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Mean squared error of feature maps at several resolutions, summed over levels.

    A level's loss is the error of the maps, plus 1/2, 1/4 and 1/8 of the errors of the maps pooled to 4×4, 2×2 and 1×1,
    divided by the sum of these weights. Grids that are not coarser than the map are skipped, and the next grid gets
    their weight. Each error is a mean over rows, channels and positions; 0 for a batch of no rows.

    Args:
        student_maps: ``[B,C,H,W]`` for each level, any floating type.
        teacher_maps: of the same shapes; no gradient flows to them.

    Returns:
        fp32 scalar (fp64 for fp64 maps).

    Raises:
        ModelError: the two shapes of a level differ.
    """
    with no_autocast(student_maps[0]):
        return torch.stack([_level_loss(*pair) for pair in zip(student_maps, teacher_maps, strict=True)]).sum()


def _level_loss(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    # Pooling is linear, so the difference is pooled once, not both maps.
    difference_BCHW = _difference(student_BCHW, teacher_BCHW)
    coarser = [side for side in _POOLED_SIDES if side < difference_BCHW.shape[2]]
    scales = [difference_BCHW, *(_pooled(difference_BCHW, side) for side in coarser)]
    weights = [0.5**number for number in range(len(scales))]
    errors = [weight * _mean_square(scale) for weight, scale in zip(weights, scales, strict=True)]
    return torch.stack(errors).sum() / sum(weights)


def _pooled(x_BCHW: Tensor, side: int) -> Tensor:
    """[B,C,H,W] to [B,C,side,side]."""
    if not torch.are_deterministic_algorithms_enabled():
        return adaptive_avg_pool2d(x_BCHW, side)
    # Torch has no deterministic gradient of it on GPUs. Matrix products over the same windows have one, and take up to
    # four times as long.
    eyes = (torch.eye(length, dtype=x_BCHW.dtype, device=x_BCHW.device) for length in x_BCHW.shape[2:])
    rows_HS, columns_WS = (adaptive_avg_pool1d(eye, side) for eye in eyes)
    return rows_HS.T @ (x_BCHW @ columns_WS)


def _difference(student_BCHW: Tensor, teacher_BCHW: Tensor) -> Tensor:
    check_same_shape(
        student_BCHW,
        teacher_BCHW,
        of="feature maps",
        expected="one shape [B,C,H,W], into which the student's maps are fused",
    )
    dtype = torch.promote_types(student_BCHW.dtype, torch.float32)
    difference_BCHW = student_BCHW.to(dtype) - teacher_BCHW.detach().to(dtype)
    # A gradient is at most twice the difference, and has the student's type.
    limit = min(_MAX_DIFFERENCE, torch.finfo(student_BCHW.dtype).max / 2)
    return difference_BCHW.clamp(-limit, limit)


def _mean_square(x_BCHW: Tensor) -> Tensor:
    """Mean over all entries, first within rows to keep sums short; 0 without rows."""
    return x_BCHW.square().flatten(1).mean(dim=1).sum() / max(len(x_BCHW), 1)
