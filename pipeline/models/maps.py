"""Maps of logits on other grids: resampled, and which of their positions show the image."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def to_grid(map_BKhw: Tensor, grid: tuple[int, int]) -> Tensor:
    """The map on another grid, [B,K,G,H]; the map itself if the grids are equal.

    Along each axis: the mean over a cell, in which positions weigh by their overlap with it, if the grid is coarser;
    bilinear, as ``interpolate`` with ``align_corners=False``, if it is finer.

    Two matrix products, whose gradients are deterministic on GPUs.

    Args:
        grid: height and width in positions.
    """
    for axis in (0, 1):
        num, num_new = map_BKhw.shape[2 + axis], grid[axis]
        if num != num_new:
            weight_GS = grid_weights(num, num_new).to(map_BKhw)
            map_BKhw = weight_GS @ map_BKhw if axis == 0 else map_BKhw @ weight_GS.T
    return map_BKhw


@cache
def grid_weights(num: int, num_new: int) -> Tensor:
    """fp32 [G,S]: the weights of S positions in each of G cells of the same line; they add up to 1."""
    step = num / num_new
    cell_G, position_S = torch.arange(num_new, dtype=torch.float64), torch.arange(num, dtype=torch.float64)
    if num_new < num:
        low_G, high_G = cell_G * step, (cell_G + 1) * step
        overlap_GS = torch.minimum(high_G[:, None], position_S + 1) - torch.maximum(low_G[:, None], position_S)
        return (overlap_GS.clamp_min(0) / step).float()
    centre_G = ((cell_G + 0.5) * step - 0.5).clamp(0, num - 1)
    return (1 - (centre_G[:, None] - position_S).abs()).clamp_min(0).float()


def at_centres(pixels_BHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B,G,H]: the value of the pixel at the centre of each cell of a grid; of two, of the lower right one."""
    rows, columns = (
        (2 * torch.arange(num, device=pixels_BHW.device) + 1) * side // (2 * num)
        for num, side in zip(grid, pixels_BHW.shape[1:], strict=True)
    )
    return pixels_BHW[:, rows[:, None], columns]
