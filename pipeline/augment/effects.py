"""Jitter, RandAugment and erasing of one uint8 view, from its augmentation parameters alone.

Replay needs the same bits for any number of threads, any memory layout and any processor. Blends are therefore two
products and a sum of float32, rounded to the nearest level, and geometry copies whole pixels: torchvision's blends and
affine sampling fuse multiplications with additions, and processors that cannot fuse them give other bits. Operations
without such a step are torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import count, permutations

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from pipeline.augment.options import OPS
from schemas.cache_format import BOX_SIDES, JITTERS

Effect = Callable[[Tensor, float], Tensor]
_ORDERS = list(permutations(JITTERS))
_FILL_LEVEL = 128


def apply_options(view_CHW: Tensor, aug_params: Mapping[str, float]) -> Tensor:
    """Applies jitter, then the operations in their order, then the erased box.

    Args:
        view_CHW: uint8 [3, H, W]; not modified.
        aug_params: one row of ``schemas.cache_format.aug_param_columns``; ``to_input`` applies those of cutmix.

    Returns:
        uint8 [3, H, W] over H×W×C memory.
    """
    steps = [*_jitter_steps(aug_params), *_op_steps(aug_params)]
    if steps:
        # Contiguous channels are about twice as fast here, and 7 times in autocontrast.
        view_CHW = view_CHW.contiguous()
        for effect, value in steps:
            view_CHW = effect(view_CHW, value)
        view_CHW = view_CHW.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return _erase(view_CHW, aug_params) if aug_params.get("erase_width") else view_CHW


def _jitter_steps(aug_params: Mapping[str, float]) -> Iterator[tuple[Effect, float]]:
    if "jitter_order" in aug_params:
        for name in _ORDERS[int(aug_params["jitter_order"])]:
            yield _JITTERS[name], aug_params[f"jitter_{name}"]


def _op_steps(aug_params: Mapping[str, float]) -> Iterator[tuple[Effect, float]]:
    for number in count(1):
        if f"op{number}" not in aug_params:
            return
        yield _OPS[OPS[int(aug_params[f"op{number}"])]], aug_params[f"op{number}_magnitude"]


def pixel_edges(box_B4: Tensor, *, height: int, width: int) -> Tensor:
    """Boxes in fractions of a view to pixels; right and bottom are exclusive.

    An edge at fraction f of n pixels is at rint(f · n), in float64, halves to even.

    Args:
        box_B4: float32 (left, top, width, height) in 0..1.

    Returns:
        int64 [B, 4]: left, top, right, bottom.
    """
    left_B, top_B, width_B, height_B = box_B4.double().unbind(-1)
    edges = [left_B * width, top_B * height, (left_B + width_B) * width, (top_B + height_B) * height]
    return torch.stack(edges, dim=-1).round_().long()


def _blend(view_CHW: Tensor, base_CHW: Tensor, factor: float) -> Tensor:
    """``factor · view + (1 − factor) · base``, rounded to the nearest level in 0..255."""
    if factor == 1:
        return view_CHW
    result_CHW = view_CHW.to(torch.float32).mul_(factor)
    return result_CHW.add_(base_CHW.to(torch.float32) * (1 - factor)).round_().clamp_(0, 255).to(torch.uint8)


def _grey(view_CHW: Tensor) -> Tensor:
    """ITU-R 601 luma in 16-bit fixed point, as Pillow's mode L: int32 [1, H, W]."""
    red, green, blue = view_CHW.to(torch.int32)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16)[None]


def _brightness(view_CHW: Tensor, factor: float) -> Tensor:
    return _blend(view_CHW, torch.zeros(()), factor)


def _saturation(view_CHW: Tensor, factor: float) -> Tensor:
    return _blend(view_CHW, _grey(view_CHW), factor)


def _contrast(view_CHW: Tensor, factor: float) -> Tensor:
    grey = _grey(view_CHW)
    # In integers: a float32 sum of more than 256 x 256 levels is not exact, so it would depend on the order.
    mean = (2 * int(grey.sum()) + grey.numel()) // (2 * grey.numel())
    return _blend(view_CHW, torch.tensor(mean), factor)


def _hue(view_CHW: Tensor, shift: float) -> Tensor:
    """Shifts the hue of HSV by a fraction of the colour circle; greys do not change."""
    if shift == 0:
        return view_CHW
    levels_CHW = view_CHW.to(torch.float32)
    red, green, blue = levels_CHW
    high = torch.maximum(torch.maximum(red, green), blue)
    span = high - torch.minimum(torch.minimum(red, green), blue)
    is_red, is_green = high == red, high == green
    across = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green))
    start = torch.where(is_red, 0.0, torch.where(is_green, 2.0, 4.0))
    sixths = across / span.clamp_min(1) + start
    angle_CHW = torch.stack([sixths + (6 * shift + offset) for offset in (5, 3, 1)])
    angle_CHW -= 6 * torch.floor(angle_CHW / 6)
    share_CHW = torch.minimum(angle_CHW, 4 - angle_CHW).clamp_(0, 1)
    return (high - span * share_CHW).round_().to(torch.uint8)


def _sharpness(view_CHW: Tensor, factor: float) -> Tensor:
    """Blends with the view smoothed by (1 1 1, 1 5 1, 1 1 1) / 13; the outermost pixels do not change."""
    int_CHW = view_CHW.to(torch.int32)
    rows = int_CHW[:, :-2] + int_CHW[:, 1:-1] + int_CHW[:, 2:]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * int_CHW[:, 1:-1, 1:-1]
    result_CHW = view_CHW.clone()
    result_CHW[:, 1:-1, 1:-1] = _blend(view_CHW[:, 1:-1, 1:-1], torch.round(sums / 13), factor)
    return result_CHW


def _affine(view_CHW: Tensor, matrix: tuple[float, float, float, float], shift: tuple[float, float]) -> Tensor:
    """Each pixel p takes the value at ``matrix · p − shift`` (nearest pixel), grey outside of the view.

    Args:
        matrix: row by row; ``p`` is the centre of a pixel, x to the right and y down from the centre of the view.
        shift: x and y, in fractions of the view.
    """
    height, width = view_CHW.shape[1:]
    x_W, y_H = (torch.arange(side, dtype=torch.float64) + (0.5 - side / 2) for side in (width, height))
    columns_HW, rows_HW = (
        torch.floor(along_x * x_W + along_y * y_H[:, None] + (side / 2 - side * by)).to(torch.int32)
        for along_x, along_y, side, by in zip(matrix[::2], matrix[1::2], (width, height), shift, strict=True)
    )
    outside_HW = (columns_HW < 0) | (columns_HW >= width) | (rows_HW < 0) | (rows_HW >= height)
    source_HW = (rows_HW * width + columns_HW).masked_fill_(outside_HW, height * width)
    grey_1C = torch.full((1, 3), _FILL_LEVEL, dtype=torch.uint8)
    pixels_PC = torch.cat([view_CHW.permute(1, 2, 0).reshape(-1, 3), grey_1C])
    return pixels_PC.index_select(0, source_HW.view(-1)).view(height, width, 3).permute(2, 0, 1).contiguous()


def _rotate(view_CHW: Tensor, degrees: float) -> Tensor:
    sine, cosine = _sine_cosine(degrees * 0.017453292519943295)
    return _affine(view_CHW, (cosine, -sine, sine, cosine), (0, 0))


def _sine_cosine(angle: float) -> tuple[float, float]:
    """Taylor series for |angle| <= 1 radian, since versions of libm differ in the last bit."""
    sine, cosine, square = 1.0, 1.0, angle * angle
    for degree in range(18, 0, -2):
        sine = 1 - sine * square / (degree * (degree + 1))
        cosine = 1 - cosine * square / (degree * (degree - 1))
    return sine * angle, cosine


def _erase(view_CHW: Tensor, aug_params: Mapping[str, float]) -> Tensor:
    box_14 = torch.tensor([[aug_params[f"erase_{side}"] for side in BOX_SIDES]])
    left, top, right, bottom = pixel_edges(box_14, height=view_CHW.shape[1], width=view_CHW.shape[2])[0].tolist()
    colour_C = torch.tensor([int(aug_params[f"erase_{name}"]) for name in ("red", "green", "blue")], dtype=torch.uint8)
    result_CHW = view_CHW.clone()
    result_CHW[:, top:bottom, left:right] = colour_C[:, None, None]
    return result_CHW


_JITTERS: dict[str, Effect] = {
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": _hue,
}
_OPS: dict[str, Effect] = {
    "identity": lambda view, _: view,
    "shear_x": lambda view, shear: _affine(view, (1, shear, 0, 1), (0, 0)),
    "shear_y": lambda view, shear: _affine(view, (1, 0, shear, 1), (0, 0)),
    "translate_x": lambda view, shift: _affine(view, (1, 0, 0, 1), (shift, 0)),
    "translate_y": lambda view, shift: _affine(view, (1, 0, 0, 1), (0, shift)),
    "rotate": _rotate,
    "brightness": _brightness,
    "saturation": _saturation,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": lambda view, bits: functional.posterize(view, int(bits)),
    "solarize": lambda view, threshold: functional.solarize(view, threshold),
    "autocontrast": lambda view, _: functional.autocontrast(view),
    "equalize": lambda view, _: functional.equalize(view),
}
