"""Masks of views against loops and Pillow; masks that cannot be used, by their reasons."""

from __future__ import annotations

import io
import struct
import zlib
from fractions import Fraction
from math import floor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipeline.augment.pixels import apply_view
from pipeline.tasks.masks import BadMaskError, check_mask, decode_mask, mask_of_view

IGNORE = 255


def indices(height: int, width: int, num_classes: int = 19) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, num_classes, (height, width)).astype(np.uint8)


def png(image: Image.Image, **keys: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **keys)
    return buffer.getvalue()


def palette(mask_HW: NDArray[np.uint8]) -> Image.Image:
    """With colours that differ from the indices."""
    image = Image.fromarray(mask_HW).convert("P")
    image.putdata(mask_HW.flatten().tolist())
    image.putpalette([255 - level for level in range(256) for _ in range(3)])
    return image


def expected_view(mask: NDArray[Any], box: tuple[int, ...], flip: bool, size: tuple[int, int]) -> list[list[int]]:
    left, top, width, height = box
    rows: list[list[int]] = []
    for y in range(size[0]):
        row: list[int] = []
        for x in range(size[1]):
            at_y = top + floor((y + Fraction(1, 2)) * height / size[0])
            at_x = left + floor((x + Fraction(1, 2)) * width / size[1])
            # The first row and column always show the image.
            at_y, at_x = (
                min(at, limit - 1) if not first else at
                for at, limit, first in ((at_y, mask.shape[0], y), (at_x, mask.shape[1], x))
            )
            inside = at_y < mask.shape[0] and at_x < mask.shape[1]
            row.append(int(mask[at_y, at_x]) if inside else IGNORE)
        rows.append(row[::-1] if flip else row)
    return rows


@settings(max_examples=60, deadline=None)
@given(st.data(), st.booleans())
def test_each_pixel_has_the_index_at_its_centre(data: st.DataObject, flip: bool) -> None:
    height, width, rows, columns = (data.draw(st.integers(1, 17)) for _ in range(4))
    box = (
        data.draw(st.integers(0, width - 1)),
        data.draw(st.integers(0, height - 1)),
        data.draw(st.integers(1, 40)),
        data.draw(st.integers(1, 40)),
    )
    mask = indices(height, width)
    view = mask_of_view(mask, box, flip, (rows, columns), ignore=IGNORE)
    assert view.tolist() == expected_view(mask, box, flip, (rows, columns))


@pytest.mark.parametrize("factor", [1, 3, 5])
def test_a_mask_is_pillows_where_centres_are_whole_pixels(factor: int) -> None:
    """An odd factor has the centre of each pixel of the view in the middle of a pixel of the mask."""
    mask = indices(40, 60)
    box = (4, 3, 6 * factor, 5 * factor)
    crop = Image.fromarray(mask).crop((4, 3, 4 + 6 * factor, 3 + 5 * factor))
    expected = np.array(crop.resize((6, 5), Image.Resampling.NEAREST))
    assert mask_of_view(mask, box, False, (5, 6), ignore=IGNORE).tolist() == expected.tolist()


@pytest.mark.parametrize("box", [(0, 0, 30, 60), (7, 3, 40, 40), (20, 5, 15, 20), (0, 0, 900, 900)])
@pytest.mark.parametrize("flip", [False, True])
def test_padding_of_a_mask_is_that_of_the_pixels(box: tuple[int, int, int, int], flip: bool) -> None:
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    view = apply_view(image, box, flip, size=(24, 16), interpolation="bilinear", fill=(9, 9, 9))
    mask = mask_of_view(np.zeros((20, 30), np.uint8), box, flip, (24, 16), ignore=IGNORE)
    assert ((view[0] == 9).numpy() == (mask == IGNORE)).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["palette", "grey"])
def test_indices_are_read_at_any_depth(kind: str, bits: int) -> None:
    mask = indices(5, 9, 2**bits)
    if kind == "palette":
        data = png(palette(mask), bits=bits)
    elif bits == 1:
        data = png(Image.fromarray(mask.astype(np.bool_)))
    else:
        data = grey_png(mask, bits)
    assert decode_mask(data, max_pixels=45).tolist() == mask.tolist()


def grey_png(mask: NDArray[np.uint8], bits: int) -> bytes:
    """Pillow does not write grey levels of 2 and 4 bits."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = mask.shape
    planes = (mask[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1
    rows = np.packbits(planes.reshape(height, -1).astype(np.uint8), axis=1)
    content = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


def test_indices_of_16_bits() -> None:
    mask = np.array([[0, 300], [65_535, 7]], np.uint16)
    assert decode_mask(png(Image.fromarray(mask)), max_pixels=4).tolist() == mask.tolist()


def rotated_png() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return png(Image.fromarray(indices(4, 4)), exif=exif)


BAD: dict[str, tuple[bytes, str]] = {
    "colours": (png(palette(indices(4, 4)).convert("RGB")), "RGB"),
    "alpha": (png(Image.fromarray(indices(4, 4)).convert("LA")), "LA"),
    "truncated": (png(Image.fromarray(indices(4, 4)))[:-30], "damaged"),
    "large": (png(Image.fromarray(indices(5, 5))), "more than 16"),
    "no PNG": (b"GIF89a", "no PNG"),
    "empty": (b"", "empty"),
    "rotated": (rotated_png(), "rotate"),
}


@pytest.mark.parametrize(("data", "reason"), BAD.values(), ids=BAD)
def test_a_mask_that_cannot_be_used_has_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadMaskError, match=reason):
        decode_mask(data, max_pixels=16)


def test_an_ignored_value_of_16_bits_is_the_padding_of_a_mask_of_8_bits() -> None:
    view = mask_of_view(np.array([[3, 4]], np.uint8), (1, 0, 2, 1), False, (1, 2), ignore=65_535)
    assert view.tolist() == [[4, 65_535]]


def test_a_mask_is_of_the_upright_image_and_has_its_classes_or_the_ignored_value() -> None:
    mask = np.array([[0, 18, 255], [3, 4, 5]], np.uint8)
    assert check_mask(mask, 3, 2, num_classes=19, ignore=255) is None
    assert "EXIF" in str(check_mask(mask, 2, 3, num_classes=19, ignore=255))
    assert "EXIF" not in str(check_mask(mask, 4, 3, num_classes=19, ignore=255))
    assert "18" in str(check_mask(mask, 3, 2, num_classes=18, ignore=255))
    assert "255" in str(check_mask(mask, 3, 2, num_classes=19, ignore=0))
