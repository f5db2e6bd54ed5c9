"""Which pixels of the original a view shows, by integers alone: pixels and targets of a view agree on it.

A box (left, top, width, height) in pixels of the original begins inside it and may reach beyond its right and lower
edges. Along an axis, pixel x of the n pixels of a view shows the pixel of the original that contains its centre,
``start + (2x + 1) * length // 2n``. Pixels of the view whose source lies beyond the original are padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from schemas.config import Size, height_width


def num_visible(start: int, length: int, num: int, limit: int) -> int:
    """How many of the ``num`` pixels along an axis of a view show the original, the first ones; at least one, which
    shows the last pixel of the original.

    Args:
        start, length: of the box along the axis, ``0 <= start < limit``.
        limit: pixels of the original along the axis.
    """
    # The sources before ``limit``: (2x + 1) · length < 2 · num · (limit − start).
    return min(max(-((length - 2 * num * (limit - start)) // (2 * length)), 1), num)


def source_positions(start: int, length: int, num: int, limit: int) -> NDArray[np.int64]:
    """The pixel of the original that each visible pixel shows: [``num_visible``]."""
    at_M = np.arange(num_visible(start, length, num, limit), dtype=np.int64)
    return np.minimum(start + (2 * at_M + 1) * length // (2 * num), limit - 1)


def grid_size(size: Size, stride: int) -> tuple[int, int]:
    """Height and width of the grid of a view, one position for each ``stride`` pixels; the last ones may have fewer.

    Args:
        size: height and width of the view.
    """
    height, width = height_width(size)
    return -(-height // stride), -(-width // stride)


def visible_size(box: Sequence[int], size: tuple[int, int], original: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the part of a view that shows the original: its upper left, before a flip.

    Args:
        box: (left, top, width, height).
        size: height and width of the view.
        original: height and width of the image.
    """
    left, top, width, height = (int(value) for value in box)
    return num_visible(top, height, size[0], original[0]), num_visible(left, width, size[1], original[1])
