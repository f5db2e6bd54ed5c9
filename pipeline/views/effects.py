"""The pixels of a plan's options: jitter, RandAugment and erasing of one uint8 view, from its drawn parameters alone.

Replay needs the same bits from any number of threads, any memory layout and any processor. So blends are two products
and a sum of float32, rounded to the nearest level, and geometry copies whole pixels: torchvision's blends and affine
sampling fuse multiplications with additions, which gives other bits on processors that cannot. The operations without
such a step are torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import permutations

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from pipeline.views.options import OPS

_ORDERS = list(permutations(("brightness", "contrast", "saturation", "hue")))
_UNCOVERED = 128


def apply_options(view_CHW: Tensor, drawn: Mapping[str, float]) -> Tensor:
    """A view under its drawn parameters: jitter, then the operations in their order, then the erased box.

    Args:
        view_CHW: uint8 [3, S, S]; left as it is.
        drawn: one row of ``schemas.cache.drawn_columns``; those of mixing are for ``to_input``.

    Returns:
        uint8 [3, S, S].
    """
    if "jitter_order" in drawn:
        for name in _ORDERS[int(drawn["jitter_order"])]:
            view_CHW = _JITTERS[name](view_CHW, drawn[f"jitter_{name}"])
    number = 1
    while f"op{number}" in drawn:
        view_CHW = apply_op(view_CHW, int(drawn[f"op{number}"]), drawn[f"op{number}_magnitude"])
        number += 1
    return _erase(view_CHW, drawn) if drawn.get("erase_width") else view_CHW


def apply_op(view_CHW: Tensor, op: int, magnitude: float) -> Tensor:
    """One operation of RandAugment on uint8 [3, S, S]; ``op`` is its place in ``OPS``."""
    return _APPLY[OPS[op]](view_CHW, magnitude)


def pixel_edges(box_B4: Tensor, *, height: int, width: int) -> Tensor:
    """The pixels that boxes in fractions of a view cover: from left and top up to, but not including, right and bottom.

    An edge at fraction f of n pixels lies at rint(f · n), in float64, halves to even.

    Args:
        box_B4: float32 (left, top, width, height) in 0..1.

    Returns:
        int64 [B, 4]: left, top, right, bottom.
    """
    box_B22 = box_B4.double().view(-1, 2, 2)
    edges_B22 = torch.cat([box_B22[:, :1], box_B22.sum(1, keepdim=True)], dim=1)
    size_2 = torch.tensor([width, height], dtype=torch.float64, device=box_B4.device)
    return torch.round(edges_B22 * size_2).long().view(-1, 4)


def _blend(view_CHW: Tensor, other_CHW: Tensor | int, factor: float) -> Tensor:
    """``factor · view + (1 − factor) · other``, to the nearest level within 0..255."""
    if factor == 1:
        return view_CHW
    mixed_CHW = view_CHW.to(torch.float32) * factor + other_CHW * (1 - factor)
    return mixed_CHW.round_().clamp_(0, 255).to(torch.uint8)


def _grey(view_CHW: Tensor) -> Tensor:
    """ITU-R 601 luma in 16-bit fixed point, as Pillow's mode L: int32 [1, S, S]."""
    red, green, blue = view_CHW.contiguous().to(torch.int32)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16)[None]


def _brightness(view_CHW: Tensor, factor: float) -> Tensor:
    return _blend(view_CHW, 0, factor)


def _saturation(view_CHW: Tensor, factor: float) -> Tensor:
    return _blend(view_CHW, _grey(view_CHW), factor)


def _contrast(view_CHW: Tensor, factor: float) -> Tensor:
    grey = _grey(view_CHW)
    # In integers: a float32 sum of more than 256 x 256 levels depends on the number of threads.
    mean = (2 * int(grey.sum()) + grey.numel()) // (2 * grey.numel())
    return _blend(view_CHW, mean, factor)


def _hue(view_CHW: Tensor, turn: float) -> Tensor:
    """The hue of HSV moved on by ``turn``, a share of the colour circle; greys stay."""
    if turn == 0:
        return view_CHW
    levels_CHW = view_CHW.contiguous().to(torch.float32)
    red, green, blue = levels_CHW
    high, low = levels_CHW.amax(0), levels_CHW.amin(0)
    span = high - low
    sixths = torch.where(
        high == red,
        (green - blue) / span.clamp_min(1),
        torch.where(high == green, (blue - red) / span.clamp_min(1) + 2, (red - green) / span.clamp_min(1) + 4),
    )
    made: list[Tensor] = []
    for place in (5, 3, 1):
        angle = sixths + (6 * turn + place)
        angle = angle - 6 * torch.floor(angle / 6)
        made.append(high - span * torch.minimum(angle, 4 - angle).clamp_(0, 1))
    return torch.stack(made, dim=-1).round_().to(torch.uint8).permute(2, 0, 1)


def _sharpness(view_CHW: Tensor, factor: float) -> Tensor:
    """Away from or towards the view smoothed by (1 1 1, 1 5 1, 1 1 1) / 13; the outermost pixels stay."""
    wide_CHW = view_CHW.to(torch.int32)
    bands = wide_CHW[:, :-2] + wide_CHW[:, 1:-1] + wide_CHW[:, 2:]
    sums = bands[..., :-2] + bands[..., 1:-1] + bands[..., 2:] + 4 * wide_CHW[:, 1:-1, 1:-1]
    made_CHW = view_CHW.clone()
    made_CHW[:, 1:-1, 1:-1] = _blend(view_CHW[:, 1:-1, 1:-1], torch.round(sums / 13), factor)
    return made_CHW


def _moved(view_CHW: Tensor, matrix: tuple[float, float, float, float], shift: tuple[float, float]) -> Tensor:
    """Each pixel shows the one under ``matrix · p − shift``, grey where that lies outside.

    Args:
        matrix: row by row; ``p`` is the pixel's centre, x to the right and y down from the centre of the view.
        shift: x and y, in fractions of the view.
    """
    size = view_CHW.shape[-1]
    centre = torch.arange(size, dtype=torch.float64) + (0.5 - size / 2)
    columns_SS, rows_SS = (
        torch.floor(along_x * centre + along_y * centre[:, None] + (size / 2 - size * by)).to(torch.int32)
        for along_x, along_y, by in zip(matrix[::2], matrix[1::2], shift, strict=True)
    )
    outside_SS = (columns_SS < 0) | (columns_SS >= size) | (rows_SS < 0) | (rows_SS >= size)
    source_SS = (rows_SS * size + columns_SS).masked_fill_(outside_SS, size * size)
    grey_1C = torch.full((1, 3), _UNCOVERED, dtype=torch.uint8)
    pixels_PC = torch.cat([view_CHW.permute(1, 2, 0).reshape(-1, 3), grey_1C])
    return pixels_PC.index_select(0, source_SS.view(-1)).view(size, size, 3).permute(2, 0, 1)


def _rotated(view_CHW: Tensor, degrees: float) -> Tensor:
    sine, cosine = _sine_cosine(degrees * 0.017453292519943295)
    return _moved(view_CHW, (cosine, -sine, sine, cosine), (0, 0))


def _sine_cosine(angle: float) -> tuple[float, float]:
    """By their series, step by step: libm's versions differ in the last bit. For |angle| <= 1 radian."""
    sine, cosine, square = 1.0, 1.0, angle * angle
    for degree in range(18, 0, -2):
        sine = 1 - sine * square / (degree * (degree + 1))
        cosine = 1 - cosine * square / (degree * (degree - 1))
    return sine * angle, cosine


def _erase(view_CHW: Tensor, drawn: Mapping[str, float]) -> Tensor:
    box_14 = torch.tensor([[drawn[f"erase_{side}"] for side in ("left", "top", "width", "height")]])
    left, top, right, bottom = pixel_edges(box_14, height=view_CHW.shape[1], width=view_CHW.shape[2])[0].tolist()
    colour_C = torch.tensor([int(drawn[f"erase_{name}"]) for name in ("red", "green", "blue")], dtype=torch.uint8)
    made_CHW = view_CHW.clone()
    made_CHW[:, top:bottom, left:right] = colour_C[:, None, None]
    return made_CHW


_JITTERS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": _hue,
}
_APPLY: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda view, _: view,
    "shear_x": lambda view, by: _moved(view, (1, by, 0, 1), (0, 0)),
    "shear_y": lambda view, by: _moved(view, (1, 0, by, 1), (0, 0)),
    "translate_x": lambda view, by: _moved(view, (1, 0, 0, 1), (by, 0)),
    "translate_y": lambda view, by: _moved(view, (1, 0, 0, 1), (0, by)),
    "rotate": _rotated,
    "brightness": _brightness,
    "saturation": _saturation,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": lambda view, bits: functional.posterize(view, int(bits)),
    "solarize": lambda view, threshold: functional.solarize(view, threshold),
    "autocontrast": lambda view, _: functional.autocontrast(view),
    "equalize": lambda view, _: functional.equalize(view),
}
