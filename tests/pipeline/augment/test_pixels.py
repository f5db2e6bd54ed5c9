"""Pixels of a view: identity, order of steps, strides and threads; digests against plain loops."""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from pipeline.augment.pixels import apply_view, pixel_digest, pixel_mean, to_input
from schemas.config import Interpolation
from tests.processors import printed
from tests.tolerances import ulps

MODES: tuple[Interpolation, ...] = ("bilinear", "bicubic")
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("interpolation", MODES)
def test_a_box_of_the_target_size_is_copied_and_flipped(interpolation: Interpolation) -> None:
    image = noise(3, 40, 50)
    view = apply_view(image, (7, 3, 20, 20), True, size=20, interpolation=interpolation)
    assert view.tolist() == [[row[7:27][::-1] for row in channel[3:23]] for channel in image.tolist()]


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize("box", [(0, 0, 90, 70), (11, 5, 33, 60), (89, 69, 1, 1), (0, 10, 90, 1)])
def test_pixels_do_not_depend_on_strides(interpolation: Interpolation, box: tuple[int, ...]) -> None:
    planes = noise(3, 70, 90)
    interleaved = planes.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    from_planes = apply_view(planes, box, False, size=24, interpolation=interpolation)
    from_interleaved = apply_view(interleaved, box, False, size=24, interpolation=interpolation)
    assert from_planes.shape == (3, 24, 24)
    assert torch.equal(from_planes, from_interleaved)


def resized() -> str:
    """The digest of views of many box shapes, smaller and larger than the view."""
    image, random = noise(3, 190, 230), np.random.Generator(np.random.PCG64(0))
    views = hashlib.sha256()
    for interpolation in MODES:
        for _ in range(60):
            left, top = (int(random.integers(0, end)) for end in (229, 189))
            box = (left, top, int(random.integers(1, 231 - left)), int(random.integers(1, 191 - top)))
            views.update(pixel_digest(apply_view(image, box, False, size=64, interpolation=interpolation)))
    return views.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_no_instruction_set_changes_a_resized_pixel(capability: str) -> None:
    code = "from tests.pipeline.augment.test_pixels import resized; print(resized())"
    assert printed(code, capability=capability) == resized()


@pytest.mark.parametrize("interpolation", MODES)
def test_resizing_agrees_with_pillow(interpolation: Interpolation) -> None:
    """Both implementations round in fixed point, so they differ by up to two levels."""
    image_HWC = noise(60, 80, 3)
    resample = Image.Resampling[interpolation.upper()]
    for size in (20, 100):
        expected = Image.fromarray(image_HWC.numpy()).crop((8, 4, 72, 56)).resize((size, size), resample)
        view = apply_view(image_HWC.permute(2, 0, 1), (8, 4, 64, 52), False, size=size, interpolation=interpolation)
        difference = view.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected).astype(int)
        assert np.abs(difference).max() <= 2


def test_flip_comes_after_the_resize() -> None:
    image, box = noise(3, 45, 31), (2, 3, 25, 37)
    straight = apply_view(image, box, False, size=16, interpolation="bilinear")
    flipped = apply_view(image, box, True, size=16, interpolation="bilinear")
    assert torch.equal(flipped, straight.flip(-1))


def test_threads_do_not_change_pixels() -> None:
    image = noise(3, 120, 160)
    boxes = [(offset, offset, 100 - offset, 110 - offset) for offset in range(16)]

    def digest(box: tuple[int, ...]) -> bytes:
        return pixel_digest(apply_view(image, box, True, size=64, interpolation="bicubic"))

    expected = [digest(box) for box in boxes]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(digest, boxes * 3)) == expected * 3


def test_input_is_mixed_on_the_unit_scale_and_then_normalised() -> None:
    pixels = noise(4, 3, 2, 2)
    partner, weights = torch.tensor([1, 0, 2, 3]), torch.tensor([0.75, 0.5, 1.0, 1.0])
    mixed = to_input(pixels, mean_C=MEAN, std_C=STD, partner_B=partner, lambda_B=weights)
    for row, channel, y, x in np.ndindex(4, 3, 2, 2):
        weight = float(weights[row])
        value = weight * int(pixels[row, channel, y, x]) + (1 - weight) * int(pixels[int(partner[row]), channel, y, x])
        expected = (value / 255 - float(MEAN[channel])) / float(STD[channel])
        # Two quotients, two products and a sum of at most 1; the mean; then the division by std.
        error = ulps(8, 1 / float(STD[channel]))
        assert float(mixed[row, channel, y, x]) == pytest.approx(expected, rel=0, abs=error)


def test_lambda_one_is_the_unmixed_row_bitwise() -> None:
    pixels = noise(5, 3, 4, 4)
    mixed = to_input(pixels, mean_C=MEAN, std_C=STD, partner_B=torch.arange(4, -1, -1), lambda_B=torch.ones(5))
    assert torch.equal(mixed, to_input(pixels, mean_C=MEAN, std_C=STD))


def some_boxes() -> tuple[Tensor, Tensor, Tensor]:
    """Six rows of 12 x 10 pixels, two of them blends, one whose box is less than a pixel: partners, λ, boxes."""
    partner = torch.tensor([3, 4, 5, 0, 1, 2])
    weights = torch.tensor([0.75, 0.9, 0.5, 0.84, 0.9999, 0.6])
    side = (1 - weights).sqrt()
    corner = torch.tensor([[0.1, 0.4], [0.0, 0.0], [0.29, 0.0], [0.6, 0.6], [0.52, 0.52], [0.0, 0.0]])
    box = torch.cat([corner, side[:, None], side[:, None]], dim=1)
    box[[1, 5]] = 0
    return partner, weights, box


def test_a_box_shows_the_partner_and_a_blend_stays_a_blend() -> None:
    pixels = noise(6, 3, 12, 10)
    partner, weights, box = some_boxes()
    zero, one = torch.zeros(3), torch.ones(3)
    boxed = to_input(pixels, mean_C=zero, std_C=one, partner_B=partner, lambda_B=weights, cutmix_box_B4=box)
    blended = to_input(pixels, mean_C=zero, std_C=one, partner_B=partner, lambda_B=weights)
    assert torch.equal(boxed[[1, 5]], blended[[1, 5]])
    for row in (0, 2, 3, 4):
        left, top, box_width, box_height = box[row].tolist()
        for y, x in np.ndindex(12, 10):
            inside = round(10 * left) <= x < round(10 * (left + box_width)) and round(12 * top) <= y < round(
                12 * (top + box_height)
            )
            shown = pixels[int(partner[row]) if inside else row, :, y, x]
            assert torch.equal(boxed[row, :, y, x], shown.to(torch.float32) / 255)


@pytest.mark.parametrize("boxed", [False, True])
def test_input_does_not_depend_on_batching(boxed: bool) -> None:
    """A row has the same bits with its partner outside of the batch, as in a build, and in a whole group."""
    pixels = noise(6, 3, 12, 10)
    partner, weights, box = some_boxes()

    def mixed(rows: slice, **partners: Tensor) -> Tensor:
        boxes = box[rows] if boxed else None
        return to_input(pixels[rows], mean_C=MEAN, std_C=STD, lambda_B=weights[rows], cutmix_box_B4=boxes, **partners)

    whole = mixed(slice(None), partner_B=partner)
    for rows in (slice(0, 1), slice(1, 5), slice(5, 6)):
        part = mixed(rows, partner_B=partner[rows], partner_pixels_NCHW=pixels)
        gathered = mixed(rows, partner_B=torch.arange(len(pixels[rows])), partner_pixels_NCHW=pixels[partner[rows]])
        assert torch.equal(part, whole[rows])
        assert torch.equal(gathered, whole[rows])


def test_the_input_is_channels_last() -> None:
    pixels = noise(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    mixing = {"partner_B": torch.tensor([1, 0]), "lambda_B": torch.tensor([0.5, 0.75])}
    for boxes in (None, torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.5, 0.5]])):
        result = to_input(pixels, mean_C=MEAN, std_C=STD, **mixing, cutmix_box_B4=boxes)
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert result.dtype == torch.float32


def test_digest_is_of_the_pixels_in_row_column_channel_order() -> None:
    view = noise(3, 5, 6)
    rows = bytes(view.tolist()[c][y][x] for y in range(5) for x in range(6) for c in range(3))
    assert pixel_digest(view) == xxhash.xxh3_128(rows).digest()
    assert pixel_digest(view.permute(1, 2, 0).contiguous().permute(2, 0, 1)) == pixel_digest(view)


@given(st.integers(1, 21), st.integers(1, 21), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_mean_equals_a_loop_over_blocks(height: int, width: int, seed: int) -> None:
    view = noise(3, height, width, seed=seed)
    pixels, means = view.tolist(), np.frombuffer(pixel_mean(view), dtype=np.uint8).reshape(8, 8, 3)
    for row, column, channel in np.ndindex(8, 8, 3):
        block = [
            pixels[channel][y][x]
            for y in range(row * height // 8, math.ceil((row + 1) * height / 8))
            for x in range(column * width // 8, math.ceil((column + 1) * width / 8))
        ]
        assert means[row, column, channel] == math.floor(sum(block) / len(block) + 0.5)
