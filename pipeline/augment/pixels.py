"""The pixels of a view: crop, resize, flip and options on uint8, on the CPU; mixing and normalising on the device.

The canonical view is the uint8 result of ``apply_view``: it is what a canary's digest proves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.augment.effects import apply_options, pixel_edges
from schemas.config import Interpolation

_BLOCKS = 8


def apply_view(
    image_CHW: Tensor,
    box: Sequence[int],
    flip: bool,
    aug_params: Mapping[str, float] | None = None,
    *,
    size: int,
    interpolation: Interpolation,
) -> Tensor:
    """Crop, antialiased resize, flip, then what the plan's options drew.

    Pixels do not depend on the strides of the input. An image stored as H×W×C (a decoder's own layout, permuted) is
    resized about twice as fast as one stored as C×H×W, so decoders should not repack. The whole image at its own size
    comes back as it is, possibly sharing memory. Deterministic, and safe to call from several threads.

    Args:
        image_CHW: uint8 [3, H, W].
        box: (left, top, width, height) in pixels of ``image_CHW``.
        drawn: see ``apply_options``.
        size: height and width of the result, in pixels.

    Returns:
        uint8 [3, size, size] over H×W×C memory.
    """
    left, top, width, height = (int(value) for value in box)
    crop_HWC = image_CHW[:, top : top + height, left : left + width].permute(1, 2, 0).contiguous()
    view_CHW = _resized(crop_HWC, size, interpolation)
    view_CHW = view_CHW.flip(-1) if flip else view_CHW
    return apply_options(view_CHW, aug_params) if aug_params else view_CHW


def _resized(crop_HWC: Tensor, size: int, interpolation: Interpolation) -> Tensor:
    """[3, size, size]. Always in whole numbers, which are the same on every processor: torchvision's own resize goes
    through float32 where it expects that to be faster, and then other pixels come out."""
    if crop_HWC.shape[:2] == (size, size):
        return crop_HWC.permute(2, 0, 1)
    # The batch axis comes first: with one that is added later, the result would lie in planes.
    crop_1CHW = crop_HWC[None].permute(0, 3, 1, 2)
    return interpolate(crop_1CHW, (size, size), mode=interpolation, antialias=True, align_corners=False)[0]


def stack_views(views: Sequence[Tensor], *, room: int | None = None) -> Tensor:
    """uint8 [..., 3, S, S] each, of one shape, to [N, ..., 3, S, S] in channels-last memory.

    That is how ``apply_view`` leaves pixels and how convolutions read them fastest, so nothing is repacked on the way.
    With ``room`` they begin a block of memory that other processes can map, with as many free bytes at its end.
    """
    channels_last = [view.movedim(-3, -1) for view in views]
    out = None
    if room is not None:
        shape = (len(views), *channels_last[0].shape)
        # As torch's own collate functions do; torch.empty(shape).share_memory_() would copy.
        block = torch.UntypedStorage._new_shared(math.prod(shape) + room)  # pyright: ignore[reportPrivateUsage]
        out = torch.empty(0, dtype=torch.uint8).set_(block)[: math.prod(shape)].view(shape)
    return torch.stack(channels_last, out=out).movedim(-1, -3)


def to_input(
    pixels_BCHW: Tensor,
    *,
    mean_C: Tensor,
    std_C: Tensor,
    partner_B: Tensor | None = None,
    lambda_B: Tensor | None = None,
    cutmix_box_B4: Tensor | None = None,
    partner_pixels_NCHW: Tensor | None = None,
) -> Tensor:
    """Views to a model's input: [0,1], then ``w·x + (1−w)·x[partner]``, then ``(x − mean) / std``.

    The weight w is λ all over a row that is blended, and in a row with a box 0 inside of it and 1 outside. Each row is
    computed alone, and a weight of 1 or 0 gives the bits of the one image, so batching changes nothing.

    Args:
        pixels_BCHW: uint8, on the device.
        mean_C, std_C: float32 on the same device, on the [0,1] scale.
        partner_B: int; whom each row is mixed with. ``None``: nothing is mixed.
        lambda_B: float32; each row's own weight. Required with ``partner_B``.
        cut_B4: float32 (left, top, width, height) in fractions of the view; the box that shows the partner, by the
            rounding of ``pixel_edges``. Width 0: a blend. ``None``: all rows are blended.
        partner_pixels_NCHW: uint8; what ``partner_B`` indexes, where a partner lies outside the batch. Default: the
            batch itself.

    Returns:
        float32 [B, 3, H, W] in the memory format of ``pixels_BCHW``.
    """
    assert (partner_B is None) == (lambda_B is None), "partners and their weights come together"
    unit_BCHW = _to_unit(pixels_BCHW)
    if partner_B is not None and lambda_B is not None:
        pool_NCHW = pixels_BCHW if partner_pixels_NCHW is None else partner_pixels_NCHW
        weight_B1HW = lambda_B.to(torch.float32).view(-1, 1, 1, 1)
        if cutmix_box_B4 is not None:
            weight_B1HW = _weight_map(weight_B1HW, cutmix_box_B4, *pixels_BCHW.shape[2:])
        # Two products and a sum, not lerp: backends may fuse a lerp, and then its bits differ.
        unit_BCHW = weight_B1HW * unit_BCHW + (1 - weight_B1HW) * _to_unit(pool_NCHW[partner_B])
    return (unit_BCHW - mean_C.view(-1, 1, 1)) / std_C.view(-1, 1, 1)


def _weight_map(lambda_B111: Tensor, cutmix_box_B4: Tensor, height: int, width: int) -> Tensor:
    """The weight of each row's own pixels where some rows have boxes: float32 [B, 1, H, W]."""
    edges_B4111 = pixel_edges(cutmix_box_B4, height=height, width=width).view(-1, 4, 1, 1, 1)
    left, top, right, bottom = edges_B4111.unbind(1)
    x_W = torch.arange(width, device=cutmix_box_B4.device)
    y_H1 = torch.arange(height, device=cutmix_box_B4.device)[:, None]
    outside_B1HW = (x_W < left) | (x_W >= right) | (y_H1 < top) | (y_H1 >= bottom)
    has_box_B111 = (cutmix_box_B4[:, 2] > 0).view(-1, 1, 1, 1)
    return torch.where(has_box_B111, outside_B1HW.to(torch.float32), lambda_B111)


def _to_unit(pixels_BCHW: Tensor) -> Tensor:
    return pixels_BCHW.to(torch.float32) / 255


def pixel_digest(view_CHW: Tensor) -> bytes:
    """16 bytes: XXH3-128 (canonical, big-endian) of the uint8 pixels in H×W×C order. Not of their shape."""
    return xxhash.xxh3_128_digest(_as_hwc(view_CHW).tobytes())


def pixel_mean(view_CHW: Tensor) -> bytes:
    """192 bytes: uint8 [8, 8, 3] block means (row, column, channel), so that drift has a size and a place.

    Along an axis of length n, block i covers pixels ⌊i·n/8⌋ to ⌈(i+1)·n/8⌉ − 1: neighbours share a pixel where 8 does
    not divide n, and no block is empty for n ≥ 1. A mean is rounded half up, in integers: ⌊(2·sum + m) / 2m⌋ for m
    pixels.
    """
    view_HWC = _as_hwc(view_CHW)
    height, width, _ = view_HWC.shape
    # Sums over all rectangles from the corner: a block's sum is then four look-ups, also where blocks overlap.
    corner = np.pad(view_HWC.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0), (0, 0)))
    (top, bottom), (left, right) = _block_edges(height), _block_edges(width)
    bands = corner[bottom] - corner[top]
    sums = bands[:, right] - bands[:, left]
    counts = ((bottom - top)[:, None] * (right - left)[None, :])[..., None]
    return ((2 * sums + counts) // (2 * counts)).astype(np.uint8).tobytes()


def _block_edges(length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    starts = np.arange(_BLOCKS, dtype=np.int64) * length // _BLOCKS
    stops = -(-(np.arange(_BLOCKS, dtype=np.int64) + 1) * length // _BLOCKS)
    return starts, stops


def _as_hwc(view_CHW: Tensor) -> NDArray[np.uint8]:
    return view_CHW.permute(1, 2, 0).contiguous().numpy()
