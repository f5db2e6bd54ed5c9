"""Masks of semantic segmentation: class indexes by pixel, of an image and of its views.

A mask is a PNG of palette indices or grey levels; colours are never read. It has the size of the upright image: an
orientation in the metadata of the image applies to the image alone.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from pipeline.core.errors import first_line
from pipeline.tasks.task import UndecodableTargetError
from pipeline.tasks.view_geometry import source_positions

_PNG_START = b"\x89PNG\r\n\x1a\n"
_GREY, _DEPTH_AT, _COLOUR_AT, _HEADER_BYTES = 0, 24, 25, 33
# Pillow spreads grey levels of fewer bits over 0 to 255.
_SPREAD = {2: 85, 4: 17}
_MODES = ("1", "L", "P", "I;16")


class BadMaskError(UndecodableTargetError):
    """A mask that cannot be used."""


def decode_mask(data: bytes, *, max_pixels: int) -> NDArray[Any]:
    """The indices of a mask: uint8 [H,W], or uint16 if it has 16 bits.

    Raises:
        BadMaskError: it is no whole PNG of one channel, is rotated by its metadata, or has more than ``max_pixels``
            pixels by its header.
    """
    if not data.startswith(_PNG_START) or len(data) < _HEADER_BYTES:
        raise BadMaskError("the mask is no PNG" if data else "the mask is empty, or too large")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            _check_header(image, max_pixels)
            indices_HW = np.asarray(image)
    except BadMaskError:
        raise
    # Pillow's parsers raise many types: OSError, SyntaxError, struct.error …
    except Exception as error:
        raise BadMaskError(f"the PNG of the mask is damaged: {first_line(error)}") from error
    if data[_COLOUR_AT] == _GREY:
        indices_HW = indices_HW // _SPREAD.get(data[_DEPTH_AT], 1)
    return indices_HW.astype(np.uint16 if indices_HW.dtype.itemsize > 1 else np.uint8)


def _check_header(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise BadMaskError(f"the mask has {width}×{height} pixels, more than {max_pixels}")
    if image.mode not in _MODES:
        raise BadMaskError(f"the mask has colours ({image.mode}) in place of class indexes (a palette, or grey levels)")
    if Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) != 1:
        raise BadMaskError("the metadata of the mask rotate it")


def check_mask(mask_HW: NDArray[Any], width: int, height: int, *, num_classes: int, ignore: int) -> str | None:
    """Why this is no mask of an upright image of this size; None: it is one."""
    if mask_HW.shape != (height, width):
        got = f"the mask has {mask_HW.shape[1]}×{mask_HW.shape[0]} pixels, the image {width}×{height}"
        return f"{got}, upright (after its rotation by EXIF, if any)" if mask_HW.shape == (width, height) else got
    wrong = (mask_HW >= num_classes) & (mask_HW != ignore)
    if not wrong.any():
        return None
    values = ", ".join(map(str, np.unique(mask_HW[wrong])[:5].tolist()))
    return f"the mask has the values {values}; classes are 0 to {num_classes - 1}, or {ignore} for none"


def mask_of_view(
    mask_HW: NDArray[Any], box: Sequence[int], flip: bool, size: tuple[int, int], *, ignore: int
) -> NDArray[Any]:
    """The mask of a view: each pixel has the index of the pixel that it shows, ``ignore`` outside of the image.

    Args:
        box: (left, top, width, height) in pixels of the mask; it begins inside, and may reach beyond it.
        size: height and width of the view.

    Returns:
        [height, width] of the type of the mask, or of uint16 if ``ignore`` needs that.
    """
    left, top, width, height = (int(value) for value in box)
    rows = source_positions(top, height, size[0], mask_HW.shape[0])
    columns = source_positions(left, width, size[1], mask_HW.shape[1])
    view_hw = np.full(size, ignore, np.promote_types(mask_HW.dtype, np.min_scalar_type(ignore)))
    view_hw[: len(rows), : len(columns)] = mask_HW[rows[:, None], columns]
    return view_hw[:, ::-1].copy() if flip else view_hw
