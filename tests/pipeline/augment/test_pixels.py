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


GREEN = (10, 200, 30)


def kernel(distance: float, interpolation: Interpolation) -> float:
    """The triangle of bilinear and the cubic of bicubic resizing with a = -0.5, as Pillow has them."""
    at = abs(distance)
    if interpolation == "bilinear":
        return max(0.0, 1 - at)
    if at < 1:
        return (1.5 * at - 2.5) * at * at + 1
    return ((-0.5 * at + 2.5) * at - 4) * at + 2 if at < 2 else 0.0


def resize_weights(num: int, length: int, num_stored: int, visible: int, interpolation: Interpolation) -> np.ndarray:
    """float64 [visible, num_stored]: weights of the stored pixels of a box of ``length`` in the visible ones of
    ``num``."""
    scale = length / num
    width = max(scale, 1.0)
    weights = np.array(
        [
            [kernel((at + 0.5 - (x + 0.5) * scale) / width, interpolation) for at in range(num_stored)]
            for x in range(visible)
        ]
    )
    return weights / weights.sum(1, keepdims=True)


# Boxes of a 30 x 20 image (width x height) that reach beyond it; and the height and width of the view.
BEYOND = {
    "letterbox": ((0, 0, 30, 60), (24, 12)),
    "smaller": ((0, 0, 75, 50), (16, 24)),
    "larger": ((20, 5, 15, 20), (40, 30)),
    "place": ((7, 3, 40, 40), (25, 25)),
    "same scale": ((5, 9, 40, 32), (32, 40)),
    "no whole pixel": ((0, 0, 900, 900), (9, 9)),
}


@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize(("box", "size"), BEYOND.values(), ids=BEYOND)
def test_a_view_beyond_its_image_is_the_resized_image_on_the_colour(
    box: tuple[int, int, int, int], size: tuple[int, int], interpolation: Interpolation
) -> None:
    image, (left, top, width, height) = noise(3, 20, 30), box
    view = apply_view(image, box, False, size=size, interpolation=interpolation, fill=GREEN)
    visible = [
        max(1, sum(start + (2 * x + 1) * length // (2 * num) < limit for x in range(num)))
        for start, length, num, limit in ((top, height, size[0], 20), (left, width, size[1], 30))
    ]
    stored = image[:, top : top + height, left : left + width].double().numpy()
    rows = resize_weights(size[0], height, stored.shape[1], visible[0], interpolation)
    columns = resize_weights(size[1], width, stored.shape[2], visible[1], interpolation)
    # uint8 between the passes, which bounds an overshoot.
    expected = np.clip(np.einsum("yh,chx->cyx", rows, np.clip(stored @ columns.T, 0, 255)), 0, 255)
    inside = view[:, : visible[0], : visible[1]].double().numpy()
    # Each of the two passes rounds to a level.
    assert np.abs(inside - expected).max() <= 2
    assert np.abs(inside - expected).mean() <= 0.5
    outside = torch.ones(size, dtype=torch.bool)
    outside[: visible[0], : visible[1]] = False
    assert outside.any()
    assert (view[:, outside] == torch.tensor(GREEN, dtype=torch.uint8)[:, None]).all()


@pytest.mark.parametrize("interpolation", MODES)
def test_a_view_beyond_its_image_is_pillows_where_boxes_agree(interpolation: Interpolation) -> None:
    """Where the edge of the image is an edge of pixels of the view, its part is resized as if it were alone."""
    image = noise(3, 20, 30)
    view = apply_view(image, (6, 4, 48, 32), False, size=(16, 24), interpolation=interpolation, fill=GREEN)
    alone = apply_view(image, (6, 4, 24, 16), False, size=(8, 12), interpolation=interpolation)
    assert torch.equal(view[:, :8, :12], alone)
    mode = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((6, 4, 30, 20)).resize((12, 8), mode)
    assert (view[:, :8, :12].int() - torch.from_numpy(np.array(pillow)).permute(2, 0, 1).int()).abs().max() <= 1


def test_a_flip_mirrors_the_padding_too() -> None:
    image, box = noise(3, 20, 30), (7, 3, 40, 40)
    straight = apply_view(image, box, False, size=25, interpolation="bilinear", fill=GREEN)
    assert torch.equal(apply_view(image, box, True, size=25, interpolation="bilinear", fill=GREEN), straight.flip(-1))
    assert straight.stride() == apply_view(image, (7, 3, 10, 10), False, size=25, interpolation="bilinear").stride()


def resized() -> str:
    """The digest of views of many box shapes, smaller and larger than the view."""
    image, random = noise(3, 190, 230), np.random.Generator(np.random.PCG64(0))
    views = hashlib.sha256()
    for interpolation in MODES:
        for _ in range(60):
            left, top = (int(random.integers(0, end)) for end in (229, 189))
            box = (left, top, int(random.integers(1, 231 - left)), int(random.integers(1, 191 - top)))
            views.update(pixel_digest(apply_view(image, box, False, size=64, interpolation=interpolation)))
            beyond = (left, top, box[2] + 150, box[3] + 250)
            view = apply_view(image, beyond, False, size=(48, 64), interpolation=interpolation, fill=GREEN)
            views.update(pixel_digest(view))
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
