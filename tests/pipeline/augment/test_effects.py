"""Pixels of options against Pillow and plain loops; the same bits for any threads, strides and instruction set."""

from __future__ import annotations

import colorsys
import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional

from pipeline.augment.effects import apply_options, pixel_edges
from pipeline.augment.options import OPS
from pipeline.augment.pixels import pixel_digest
from tests.processors import printed
from tests.tolerances import ulps

SIZES = [7, 32, 97]
NEUTRAL = {"jitter_brightness": 1.0, "jitter_contrast": 1.0, "jitter_saturation": 1.0, "jitter_hue": 0.0}
# Frozen, since other pixels would be other views.
FROZEN: dict[str, str] = {
    "identity": "797bc70e0e18b56e",
    "shear_x": "b8b35294d7510dd9",
    "shear_y": "67588ec1940df257",
    "translate_x": "f062d7d4885baf80",
    "translate_y": "56b72496fa2cb1bb",
    "rotate": "79ac4b80dfb20416",
    "brightness": "2898252702059df9",
    "saturation": "86a5c666f98c6e4c",
    "contrast": "3e47675535f5ff35",
    "sharpness": "5799922f52790c4b",
    "posterize": "2711208df4de3392",
    "solarize": "0e9c49529f46b6a0",
    "autocontrast": "a95df7891406c139",
    "equalize": "a7f5ac97faad9844",
    "hue": "b7d7e4eead99f10e",
    "darker": "704516b287ea18d3",
}


def picture(size: int, seed: int = 0) -> Tensor:
    """Patches of colour with some noise: uint8 [3, S, S], with the memory layout of a view."""
    random = np.random.Generator(np.random.PCG64(seed))
    patches = random.integers(0, 256, (size // 8 + 1, size // 8 + 1, 3)).repeat(8, 0).repeat(8, 1)[:size, :size]
    noisy = np.clip(patches * 0.8 + random.integers(0, 40, (size, size, 3)), 0, 255)
    return torch.from_numpy(noisy.astype(np.uint8)).permute(2, 0, 1)


def pillow(view: Tensor) -> Image.Image:
    return Image.fromarray(view.permute(1, 2, 0).contiguous().numpy())


def max_difference(view: Tensor, expected: Image.Image | Tensor) -> int:
    expected = expected if isinstance(expected, Tensor) else torch.from_numpy(np.array(expected)).permute(2, 0, 1)
    return int((view.int() - expected.int()).abs().max())


def op(view: Tensor, name: str, magnitude: float = 0.0) -> Tensor:
    return apply_options(view, {"op1": OPS.index(name), "op1_magnitude": magnitude})


ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "saturation": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ENHANCERS)
def test_blends_equal_pillows_except_for_rounding(name: str, size: int) -> None:
    """Pillow truncates to levels, this package rounds."""
    for seed, factor in enumerate((0.0, 0.1, 0.77, 1.0, 1.31, 1.9)):
        view = picture(size, seed)
        expected = ENHANCERS[name](pillow(view)).enhance(factor)
        assert max_difference(op(view, name, factor), expected) <= (0 if factor in (0.0, 1.0) else 1)


@given(st.integers(0, 2**24 - 1), st.floats(0, 2, width=32))
@settings(deadline=None)
def test_a_blend_is_rounded_to_the_nearest_level(colour: int, factor: float) -> None:
    rgb = [colour >> 16, colour >> 8 & 255, colour & 255]
    view = torch.tensor(rgb, dtype=torch.uint8)[:, None, None].expand(3, 2, 2)
    red, green, blue = rgb
    grey = (19595 * red + 38470 * green + 7471 * blue + 32768) // 65536
    for name, base in (("brightness", 0), ("saturation", grey), ("contrast", grey)):
        for blended, level in zip(op(view, name, factor)[:, 0, 0].tolist(), rgb, strict=True):
            exact = min(max(factor * level + (1 - factor) * base, 0), 255)
            # 1 − factor, two products of at most 2 · 255 and their sum.
            assert abs(blended - exact) <= 0.5 + ulps(4, 2 * 255)


# Magnitude, Pillow's operation, and the largest difference: Pillow's autocontrast truncates to levels.
TABLES = {
    "posterize": (5.0, lambda image: ImageOps.posterize(image, 5), 0),
    "solarize": (100.25, lambda image: ImageOps.solarize(image, 101), 0),
    "equalize": (0.0, ImageOps.equalize, 0),
    "autocontrast": (0.0, ImageOps.autocontrast, 1),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TABLES)
def test_table_operations_equal_pillows(name: str, size: int) -> None:
    magnitude, reference, difference = TABLES[name]
    view = picture(size) // 2 + 30 if name == "autocontrast" else picture(size)
    assert max_difference(op(view, name, magnitude), reference(pillow(view))) <= difference


def jittered(view: Tensor, order: int = 0, **changes: float) -> Tensor:
    return apply_options(view, {"jitter_order": order, **NEUTRAL, **changes})


@pytest.mark.parametrize("shift", [-0.5, -0.2, 0.05, 0.37, 0.5])
def test_hue_equals_a_loop_and_torchvision(shift: float) -> None:
    view = picture(16)
    shifted = jittered(view, jitter_hue=shift)
    # Differences, a quotient, the shift, its fraction and 4 operations on a hue of at most 6 sectors; then 3 on levels.
    error = ulps(8, 6 * 255) + ulps(3, 255)
    for y, x in np.ndindex(16, 16):
        hue, saturation, value = colorsys.rgb_to_hsv(*(level / 255 for level in view[:, y, x].tolist()))
        expected = colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)
        assert shifted[:, y, x].tolist() == pytest.approx([255 * share for share in expected], abs=0.5 + error)
    assert max_difference(shifted, functional.adjust_hue(view, shift)) <= 1


def test_greys_have_no_hue() -> None:
    view = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16)
    assert torch.equal(jittered(view, jitter_hue=0.3), view)


def test_jitter_is_applied_in_the_stored_order() -> None:
    """Orders are the lexicographic permutations of (brightness, contrast, saturation, hue)."""
    view = picture(24)
    values = {"brightness": 1.4, "contrast": 0.7, "saturation": 1.3, "hue": 0.1}
    columns = {f"jitter_{name}": value for name, value in values.items()}
    for order, names in {
        0: ("brightness", "contrast", "saturation", "hue"),
        1: ("brightness", "contrast", "hue", "saturation"),
        9: ("contrast", "saturation", "hue", "brightness"),
        23: ("hue", "saturation", "contrast", "brightness"),
    }.items():
        expected = view
        for name in names:
            expected = jittered(expected, **{f"jitter_{name}": values[name]})
        assert torch.equal(jittered(view, order, **columns), expected)


def source_point(name: str, magnitude: float, x: float, y: float, height: int, width: int) -> tuple[float, float]:
    match name:
        case "shear_x":
            return x + magnitude * y, y
        case "shear_y":
            return x, y + magnitude * x
        case "translate_x":
            return x - magnitude * width, y
        case "translate_y":
            return x, y - magnitude * height
        case _:
            sine, cosine = math.sin(math.radians(magnitude)), math.cos(math.radians(magnitude))
            return cosine * x - sine * y, sine * x + cosine * y


GEOMETRY = [
    *[(name, magnitude) for name in OPS[1:5] for magnitude in (0.0, 0.2137, -0.3)],
    ("rotate", 30.0),
    ("rotate", -11.7),
    ("rotate", 0.0),
]


@pytest.mark.parametrize(("height", "width"), [(8, 8), (15, 15), (9, 14)])
@pytest.mark.parametrize(("name", "magnitude"), GEOMETRY)
def test_geometry_takes_the_pixel_at_each_source_point(name: str, magnitude: float, height: int, width: int) -> None:
    view = picture(15)[:, :height, :width]
    moved = op(view, name, magnitude).tolist()
    pixels = view.tolist()
    for row, column in np.ndindex(height, width):
        x, y = source_point(name, magnitude, column + 0.5 - width / 2, row + 0.5 - height / 2, height, width)
        source_row, source_column = math.floor(y + height / 2), math.floor(x + width / 2)
        inside = 0 <= source_row < height and 0 <= source_column < width
        for channel in range(3):
            expected = pixels[channel][source_row][source_column] if inside else 128
            assert moved[channel][row][column] == expected


@pytest.mark.parametrize("degrees", [30.0, -7.5])
def test_rotation_equals_pillows_at_almost_all_pixels(degrees: float) -> None:
    view = picture(64)
    expected = pillow(view).rotate(degrees, Image.Resampling.NEAREST, fillcolor=(128, 128, 128))
    same = (op(view, "rotate", degrees).permute(1, 2, 0).numpy() == np.array(expected)).all(axis=2)
    # Pillow's coordinates have 16 fractional bits.
    assert same.mean() > 0.995


BOXES = st.tuples(*[st.floats(0, 1, width=32)] * 4)


@given(st.lists(BOXES, min_size=1, max_size=4), st.integers(1, 400), st.integers(1, 400))
def test_edges_are_rounded_to_the_nearest_pixel(
    boxes: list[tuple[float, float, float, float]], height: int, width: int
) -> None:
    edges = pixel_edges(torch.tensor(boxes), height=height, width=width).tolist()
    for (left, top, box_width, box_height), actual in zip(boxes, edges, strict=True):
        assert actual == [
            round(left * width),
            round(top * height),
            round((left + box_width) * width),
            round((top + box_height) * height),
        ]


def test_erasing_changes_only_the_box() -> None:
    view = picture(20)
    box = {"erase_left": 0.1, "erase_top": 0.5, "erase_width": 0.42, "erase_height": 0.3}
    erased = apply_options(view, {**box, "erase_red": 9, "erase_green": 200, "erase_blue": 0})
    for row, column in np.ndindex(20, 20):
        expected = [9, 200, 0] if 10 <= row < 16 and 2 <= column < 10 else view[:, row, column].tolist()
        assert erased[:, row, column].tolist() == expected
    assert torch.equal(apply_options(view, {**dict.fromkeys(box, 0.0), "erase_red": 9}), view)


def test_jitter_comes_before_the_operations_in_their_order_and_erasing_comes_last() -> None:
    view = picture(24)
    jitter = {"jitter_order": 0, **NEUTRAL, "jitter_brightness": 1.3}
    ops = {"op1": 5, "op1_magnitude": 20.0, "op2": 11, "op2_magnitude": 90.0}
    box = {"erase_left": 0.0, "erase_top": 0.0, "erase_width": 0.5, "erase_height": 0.5}
    erase = {**box, "erase_red": 1, "erase_green": 2, "erase_blue": 3}
    expected = apply_options(op(op(apply_options(view, jitter), "rotate", 20.0), "solarize", 90.0), erase)
    assert torch.equal(apply_options(view, {**erase, **ops, **jitter}), expected)


def every_effect(view: Tensor) -> Iterator[tuple[str, Tensor]]:
    magnitudes = {"posterize": 5.0, "solarize": 99.5, "rotate": -21.25}
    magnitudes |= dict.fromkeys(ENHANCERS, 1.37) | dict.fromkeys(OPS[1:5], 0.2137)
    for name in OPS:
        yield name, op(view, name, magnitudes.get(name, 0.0))
    yield "hue", jittered(view, jitter_hue=0.123)
    yield "darker", jittered(view, jitter_brightness=0.61, jitter_contrast=0.83, jitter_saturation=0.29)


def all_digests() -> str:
    # At 300 pixels, sums exceed the integers that float32 represents.
    digests = [pixel_digest(view) for size in (33, 300) for _, view in every_effect(picture(size))]
    return hashlib.sha256(b"".join(digests)).hexdigest()


def test_effects_are_frozen_and_do_not_change_their_input() -> None:
    view = picture(33)
    assert {name: pixel_digest(result).hex()[:16] for name, result in every_effect(view)} == FROZEN
    assert torch.equal(view, picture(33))


def test_neither_threads_nor_strides_change_a_pixel() -> None:
    expected, threads = all_digests(), torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert all_digests() == expected
    finally:
        torch.set_num_threads(threads)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: all_digests(), range(4))) == {expected}
    planes = picture(40).contiguous()
    columns = {"jitter_order": 7, **dict.fromkeys(NEUTRAL, 0.7), "jitter_hue": 0.2}
    for number in range(len(OPS)):
        aug_params = {**columns, "op1": number, "op1_magnitude": 0.3 if number < 6 else 1.4 if number < 10 else 5.0}
        assert torch.equal(apply_options(planes, aug_params), apply_options(picture(40), aug_params))


@pytest.mark.slow
def test_no_instruction_set_changes_a_pixel() -> None:
    code = "from tests.pipeline.augment.test_effects import all_digests; print(all_digests())"
    assert printed(code, capability="default") == all_digests()
