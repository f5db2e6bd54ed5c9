"""Pixels of a view: crop, resize, flip and options in uint8 on the CPU; mixing and normalising on the device.

The canonical view is the uint8 result of ``apply_view``, which the digest of a canary verifies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.augment.effects import apply_options, pixel_edges
from pipeline.tasks.view_geometry import visible_size
from schemas.config import Interpolation, Size, height_width

_BLOCKS = 8
_RESIZES: dict[Interpolation, Callable[..., Tensor]] = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.default,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.default,
}


def apply_view(
    image_CHW: Tensor,
    box: Sequence[int],
    flip: bool,
    aug_params: Mapping[str, float] | None = None,
    *,
    size: Size,
    interpolation: Interpolation,
    fill: tuple[int, int, int] | None = None,
) -> Tensor:
    """Crops, resizes with antialiasing, flips, then applies the plan's options.

    Pixels do not depend on the strides of the input. An image stored as H×W×C (the layout of decoders, permuted) is
    resized about twice as fast as one stored as C×H×W, so decoders should not repack. The whole image at its original
    size is returned as it is and may share memory. Deterministic and thread-safe.

    Args:
        image_CHW: uint8 [3, H, W].
        box: (left, top, width, height) in pixels of ``image_CHW``. It begins inside the image.
        aug_params: see ``apply_options``.
        size: of the result, in pixels.
        fill: red, green, blue of what is outside of the image (``pipeline.tasks.view_geometry``). Required if the box
            reaches beyond it.

    Returns:
        uint8 [3, height, width] of this size, over H×W×C memory.
    """
    left, top, width, height = (int(value) for value in box)
    crop_HWC = image_CHW[:, top : top + height, left : left + width].permute(1, 2, 0).contiguous()
    if crop_HWC.shape[:2] == (height, width):
        view_CHW = _resized(crop_HWC, height_width(size), interpolation)
    else:
        assert fill is not None, "a view that reaches beyond its image needs a colour"
        rows, columns = image_CHW.shape[1:]
        visible = visible_size(box, height_width(size), (rows, columns))
        view_CHW = _padded(crop_HWC, (height, width), height_width(size), visible, interpolation, fill)
    view_CHW = view_CHW.flip(-1) if flip else view_CHW
    return apply_options(view_CHW, aug_params) if aug_params else view_CHW


def _resized(crop_HWC: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    """[3, height, width], in integer arithmetic, which is the same on every processor.

    torchvision's resize uses float32 where it expects that to be faster, with other pixels.
    """
    if crop_HWC.shape[:2] == size:
        return crop_HWC.permute(2, 0, 1)
    # The batch axis is added before the permutation; added after it, the result would not be channels-last.
    crop_1CHW = crop_HWC[None].permute(0, 3, 1, 2)
    return interpolate(crop_1CHW, size, mode=interpolation, antialias=True, align_corners=False)[0]


def _padded(
    crop_HWC: Tensor,
    box_size: tuple[int, int],
    size: tuple[int, int],
    visible: tuple[int, int],
    interpolation: Interpolation,
    fill: tuple[int, int, int],
) -> Tensor:
    """[3, height, width]: the part of a box that is inside the image, resized like the whole box, on a colour.

    Neither the colour nor pixels that are not visible change visible ones. Sizes are (height, width).
    """
    view_HWC = torch.tensor(fill, dtype=torch.uint8).expand(*size, 3).clone()
    rows, columns = visible
    if box_size == size:
        view_HWC[:rows, :columns] = crop_HWC[:rows, :columns]
    else:
        resize = _RESIZES[interpolation]
        crop_1CHW = crop_HWC[None].permute(0, 3, 1, 2)
        # With these factors as arguments the scale is exactly that of the box, and no quotient of rounded sizes.
        factors = [pixels / length for pixels, length in zip(size, box_size, strict=True)]
        view_HWC[:rows, :columns] = resize(crop_1CHW, visible, False, *factors)[0].permute(1, 2, 0)
    return view_HWC.permute(2, 0, 1)


def stack_views(views: Sequence[Tensor], *, spare_bytes: int | None = None) -> Tensor:
    """Stacks uint8 [..., 3, H, W] tensors of one shape to [N, ..., 3, H, W] in channels-last memory.

    ``apply_view`` returns this layout and convolutions are fastest with it, so pixels are never repacked.

    Args:
        spare_bytes: allocate shared memory, with this many free bytes after the pixels.
    """
    channels_last = [view.movedim(-3, -1) for view in views]
    out = None
    if spare_bytes is not None:
        shape = (len(views), *channels_last[0].shape)
        # As torch's own collate functions do; torch.empty(shape).share_memory_() would copy.
        block = torch.UntypedStorage._new_shared(math.prod(shape) + spare_bytes)  # pyright: ignore[reportPrivateUsage]
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
    """Views to the input of a model: scaled to [0,1], then ``w·x + (1−w)·x[partner]``, then ``(x − mean) / std``.

    The weight w of a blended row is λ; in a row with a box it is 0 inside of the box and 1 outside. The bits of a row
    do not depend on the other rows of the batch, and weights of 1 and 0 give the bits of one unmixed image.

    Args:
        pixels_BCHW: uint8, on the device.
        mean_C, std_C: float32 on the same device, on the [0,1] scale.
        partner_B: int; the row that each row is mixed with. ``None``: rows are not mixed.
        lambda_B: float32; the weight of the row itself. Required with ``partner_B``.
        cutmix_box_B4: float32 (left, top, width, height) in fractions of the view; the box that shows the partner,
            rounded by ``pixel_edges``. Width 0: a blend. ``None``: all rows are blended.
        partner_pixels_NCHW: uint8; the rows that ``partner_B`` indexes. Default: the batch itself.

    Returns:
        float32 [B, 3, H, W] in the memory format of ``pixels_BCHW``.
    """
    assert (partner_B is None) == (lambda_B is None), "partner_B and lambda_B must be given together"
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
    """The weight of the pixels of the row itself, where some rows have boxes: float32 [B, 1, H, W]."""
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
    """16 bytes: XXH3-128 (canonical, big-endian) of the uint8 pixels in H×W×C order, without their shape."""
    return xxhash.xxh3_128_digest(_as_hwc(view_CHW).tobytes())


def pixel_mean(view_CHW: Tensor) -> bytes:
    """192 bytes: uint8 [8, 8, 3] block means (row, column, channel), which show the size and position of a drift.

    Along an axis of length n, block i covers pixels ⌊i·n/8⌋ to ⌈(i+1)·n/8⌉ − 1: neighbours share a pixel if 8 does not
    divide n, and no block is empty for n ≥ 1. Means are rounded half up, in integers: ⌊(2·sum + m) / 2m⌋ for m pixels.
    """
    view_HWC = _as_hwc(view_CHW)
    height, width, _ = view_HWC.shape
    # A summed-area table: the sum of a block is four look-ups, also where blocks overlap.
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
