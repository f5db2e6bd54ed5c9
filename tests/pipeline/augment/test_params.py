"""View parameters against torchvision's statistics, and laws. Their values are in ``test_known_answers``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from pipeline.augment.params import (
    ViewParams,
    eval_params,
    mix_partners,
    sample_keys,
    shard_partners,
    view_params,
)
from schemas.config import ViewsConfig

CROP = ViewsConfig(kind="crop")
MIX = ViewsConfig(kind="function_matching", count=50)
SIDE = st.one_of(st.integers(1, 40), st.integers(1, 20_000))
RANGES = st.sampled_from([((0.05, 1.0), (0.75, 4 / 3)), ((1.0, 1.0), (1.0, 1.0)), ((0.9, 1.0), (0.01, 0.02))])


def ids(count: int) -> list[str]:
    return [f"train-00000/{number:08d}" for number in range(count)]


def sample(
    plan: ViewsConfig, names: Sequence[str], views: Sequence[int], sizes: Sequence[tuple[int, int]]
) -> ViewParams:
    widths, heights = np.array(sizes, dtype=np.int64).reshape(-1, 2).T
    return view_params(plan, sample_keys(plan.seed, names), np.array(views, dtype=np.int64), widths, heights)


@settings(max_examples=40)
@given(st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=20), RANGES, st.integers(0, 2**62))
def test_boxes_lie_inside_any_image(
    sizes: list[tuple[int, int]], ranges: tuple[tuple[float, float], tuple[float, float]], view: int
) -> None:
    plan = ViewsConfig(kind="crop", area=ranges[0], aspect=ranges[1])
    assert_inside(sample(plan, ids(len(sizes)), [view] * len(sizes), sizes), sizes)


@given(st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=20), st.floats(0.001, 1))
def test_eval_boxes_are_centred_squares_inside_any_image(sizes: list[tuple[int, int]], fraction: float) -> None:
    plan = ViewsConfig(kind="eval", crop_fraction=fraction)
    params = sample(plan, ids(len(sizes)), [0] * len(sizes), sizes)
    assert_inside(params, sizes)
    for (left, top, width, height), size in zip(params.box_N4.tolist(), sizes, strict=True):
        assert width == height == max(1, round(fraction * min(size)))
        assert 0 <= size[0] - width - 2 * left <= 1
        assert 0 <= size[1] - height - 2 * top <= 1
    assert not params.flip_N.any()
    assert (params.mix_lambda_N == 1).all()


def assert_inside(params: ViewParams, sizes: Sequence[tuple[int, int]]) -> None:
    left, top, width, height = params.box_N4.astype(np.int64).T
    image_width, image_height = np.array(sizes).T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (width >= 1).all()
    assert (height >= 1).all()
    assert (left + width <= image_width).all()
    assert (top + height <= image_height).all()


def test_eval_side_is_rounded_half_to_even() -> None:
    plan = ViewsConfig(kind="eval", crop_fraction=0.5)
    params = eval_params(plan, np.array([5, 7, 500, 1]), np.array([9, 7, 375, 80]))
    assert params.box_N4.tolist() == [[1, 3, 2, 2], [1, 1, 4, 4], [156, 93, 188, 188], [0, 39, 1, 1]]


@given(SIDE, SIDE, st.integers(1, 400), st.integers(1, 400), st.floats(0.001, 1))
def test_eval_boxes_of_rectangles_are_centred_and_as_large_as_their_aspect_allows(
    image_width: int, image_height: int, height: int, width: int, fraction: float
) -> None:
    plan = ViewsConfig(kind="eval", crop_fraction=fraction)
    params = eval_params(plan, np.array([image_width]), np.array([image_height]), (height, width))
    assert_inside(params, [(image_width, image_height)])
    ((left, top, box_width, box_height),) = params.box_N4.tolist()
    scale = fraction * min(Fraction(image_width, width), Fraction(image_height, height))
    # Rounded to whole pixels, of which there is at least one.
    assert abs(box_width - max(1, scale * width)) <= 0.5 + 1e-9
    assert abs(box_height - max(1, scale * height)) <= 0.5 + 1e-9
    assert 0 <= image_width - box_width - 2 * left <= 1
    assert 0 <= image_height - box_height - 2 * top <= 1


@given(SIDE, SIDE, st.integers(1, 400), st.integers(1, 400))
def test_letterboxes_are_the_smallest_boxes_of_their_aspect_around_the_image(
    image_width: int, image_height: int, height: int, width: int
) -> None:
    plan = ViewsConfig.model_validate({"kind": "eval", "eval_box": "letterbox"})
    params = eval_params(plan, np.array([image_width]), np.array([image_height]), (height, width))
    ((left, top, box_width, box_height),) = params.box_N4.tolist()
    pixels = max(Fraction(image_width, width), Fraction(image_height, height))
    assert (left, top) == (0, 0)
    assert box_width >= image_width
    assert box_height >= image_height
    assert abs(box_width - pixels * width) <= 0.5 + 1e-9
    assert abs(box_height - pixels * height) <= 0.5 + 1e-9


def test_scales_in_steps_reach_both_ends_alike() -> None:
    plan = ViewsConfig.model_validate({"kind": "scale_crop", "scale": [0.5, 2.0, 0.5], "size": 100})
    boxes_N4 = sample(plan, ids(4000), [0] * 4000, [(1000, 1000)] * 4000).box_N4
    sides, counts = np.unique(boxes_N4[:, 2], return_counts=True)
    assert sides.tolist() == [50, 67, 100, 200]
    # Within four standard deviations of a quarter each.
    assert (np.abs(counts - 1000) < 4 * math.sqrt(4000 * 0.25 * 0.75)).all()


def test_function_matching_has_the_crops_of_kind_crop() -> None:
    sizes, views = [(640, 480)] * 50, list(range(50))
    mixed, plain = sample(MIX, ids(50), views, sizes), sample(CROP, ids(50), views, sizes)
    assert np.array_equal(mixed.box_N4, plain.box_N4)
    assert np.array_equal(mixed.flip_N, plain.flip_N)
    assert (plain.mix_lambda_N == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("size", [(500, 375), (200, 900)])
def test_crops_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    count = 8000
    boxes_N4 = sample(CROP, ids(count), [0] * count, [size] * count).box_N4.astype(np.float64)
    reference_N4 = torchvision_boxes(count, size)
    # The two-sample bound at a significance of 1e-3 is 1.95 * sqrt(2 / n); both samples are fixed.
    bound = 1.95 * math.sqrt(2 / count)
    for name, measure in {
        "area": lambda box: box[:, 2] * box[:, 3],
        "aspect": lambda box: box[:, 2] / box[:, 3],
        "left": lambda box: box[:, 0],
        "top": lambda box: box[:, 1],
        "right": lambda box: size[0] - box[:, 0] - box[:, 2],
    }.items():
        assert ks_2samp(measure(boxes_N4), measure(reference_N4)).statistic < bound, name


def torchvision_boxes(count: int, size: tuple[int, int]) -> np.ndarray:
    image = torch.empty(3, size[1], size[0])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        boxes = [RandomResizedCrop.get_params(image, list(CROP.area), list(CROP.aspect)) for _ in range(count)]
    return np.array([(left, top, width, height) for top, left, height, width in boxes], dtype=np.float64)


@given(st.integers(0, 300), st.integers(0, 9), st.integers(0, 2**40))
def test_partners_are_a_matching(num_ok: int, group: int, view: int) -> None:
    partners = mix_partners(ViewsConfig(kind="function_matching", mix_group=300), "s", group, view, num_ok)
    rows = np.arange(num_ok)
    assert np.array_equal(partners[partners], rows)
    assert int((partners == rows).sum()) == num_ok % 2


@given(st.integers(0, 2**40), st.integers(1, 9))
def test_partners_repeat_in_so_many_views_and_are_those_of_their_number(view: int, mix_repeat: int) -> None:
    repeated = ViewsConfig(kind="function_matching", mix_repeat=mix_repeat)
    every_view = ViewsConfig(kind="function_matching")
    expected = mix_partners(every_view, "s", 1, view // mix_repeat, 50)
    assert np.array_equal(mix_partners(repeated, "s", 1, view, 50), expected)
    assert not np.array_equal(mix_partners(repeated, "s", 1, view + mix_repeat, 50), expected)


@given(st.integers(0, 40), st.integers(2, 9))
def test_partners_of_a_shard_are_those_of_its_groups(num_ok: int, mix_group: int) -> None:
    plan = ViewsConfig(kind="function_matching", mix_group=mix_group)
    expected: list[int] = []
    for group, start in enumerate(range(0, num_ok, mix_group)):
        inside = mix_partners(plan, "s", group, 4, min(mix_group, num_ok - start))
        expected.extend(start + int(partner) for partner in inside)
    assert shard_partners(plan, "s", 4, num_ok).tolist() == expected
