"""Random bits, boxes, flips, weights, partners and canaries, recomputed from docs/reference/format.md alone.

It uses plain Python integers and ``math``, and no code of ``pipeline.augment``, not even its keys.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, NamedTuple

import numpy as np
import pytest

from pipeline.augment.params import is_canary, mix_partners, sample_keys, view_params
from pipeline.augment.random_bits import key_of, philox4x64
from schemas.config import ViewsConfig

WORD = 2**64
Key = tuple[int, int]
Box = list[int]


def key(*parts: str | int) -> Key:
    text = b""
    for part in parts:
        if isinstance(part, int):
            text += b"i" + (part % WORD).to_bytes(8, "little")
        else:
            text += b"s" + len(part.encode()).to_bytes(8, "little") + part.encode()
    hashed = int.from_bytes(hashlib.blake2b(text).digest()[:16], "little")
    return hashed % WORD, hashed // WORD


def philox(key: Key, counter: tuple[int, int, int, int]) -> list[int]:
    """Salmon 2011, table 2 and section 3: two multiplications a round, the key bumped between rounds."""
    words = list(counter)
    for number in range(10):
        bumped = [(key[0] + number * 0x9E3779B97F4A7C15) % WORD, (key[1] + number * 0xBB67AE8584CAA73B) % WORD]
        first, second = words[0] * 0xD2E7470EE14C6C93, words[2] * 0xCA5A826395121157
        words = [
            second // WORD ^ words[1] ^ bumped[0],
            second % WORD,
            first // WORD ^ words[3] ^ bumped[1],
            first % WORD,
        ]
    return words


def uniforms(key: Key, counter: tuple[int, int, int, int]) -> list[float]:
    return [(word // 2**11) / 2**53 for word in philox(key, counter)]


def box(plan: ViewsConfig, sample_key: Key, view: int, width: int, height: int) -> Box:
    low, high = plan.aspect
    for attempt in range(10):
        area, aspect, left, top = uniforms(sample_key, (attempt, view, 0, 0))
        pixels = width * height * (plan.area[0] + (plan.area[1] - plan.area[0]) * area)
        ratio = low * (high / low) ** aspect
        box_width, box_height = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 1 <= box_width <= width and 1 <= box_height <= height:
            corner = (left * (width - box_width + 1), top * (height - box_height + 1))
            return [math.floor(corner[0]), math.floor(corner[1]), box_width, box_height]
    box_width = min(width, max(1, round(height * high)))
    box_height = min(height, max(1, round(width / low)))
    return [(width - box_width) // 2, (height - box_height) // 2, box_width, box_height]


class Case(NamedTuple):
    sample_id: str
    view: int
    size: tuple[int, int]


SIZES = {
    "landscape": (500, 375),
    "portrait": (375, 500),
    "square": (32, 32),
    "tiny": (2, 3),
    "one pixel": (1, 1),
    "a column": (1, 40),
    "panorama, where no attempt fits": (4000, 7),
    "tower, where no attempt fits": (9, 3000),
    "large": (20_000, 14_999),
}
VIEWS = (0, 1, 49, 65_534, 2**40)
IDS = ("train-00012/n01440764_18", "val/ä", "s/", "s/" + "k" * 300)
SEEDS = (0, 7, 2**63 - 1)


def cases(size: tuple[int, int]) -> list[Case]:
    return [Case(name, view, size) for name in IDS for view in VIEWS]


def sampled(plan: ViewsConfig, some: list[Case]) -> tuple[list[Box], list[bool], list[float]]:
    widths, heights = np.array([case.size for case in some], np.int64).T
    views = np.array([case.view for case in some], np.int64)
    params = view_params(plan, sample_keys(plan.seed, [case.sample_id for case in some]), views, widths, heights)
    return params.box_N4.tolist(), params.flip_N.tolist(), params.mix_lambda_N.tolist()


@pytest.mark.parametrize("parts", [(), ("aé", -2), *(("view", seed, name) for seed in SEEDS for name in IDS)])
def test_keys_and_random_bits(parts: tuple[str | int, ...]) -> None:
    expected = key(*parts)
    assert key_of(*parts).tolist() == list(expected)
    for counter in [(0, 0, 0, 0), (9, 65_534, 1, 0), (WORD - 1, WORD - 1, WORD - 1, WORD - 1)]:
        actual = philox4x64(np.array([expected], np.uint64), np.array([counter], np.uint64))
        assert actual.tolist() == [philox(expected, counter)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_boxes_flips_and_weights(size: tuple[int, int], seed: int) -> None:
    plan = ViewsConfig(kind="function_matching", seed=seed, flip=0.3, count=50)
    boxes, flips, weights = sampled(plan, cases(size))
    for case, actual_box, flip, weight in zip(cases(size), boxes, flips, weights, strict=True):
        sample_key = key("view", seed, case.sample_id)
        assert actual_box == box(plan, sample_key, case.view, *size)
        flip_uniform, share, _, _ = uniforms(sample_key, (0, case.view, 1, 0))
        assert flip == (flip_uniform < 0.3)
        assert weight == np.float32(max(share, 1 - share))


SCALES: dict[str, dict[str, Any]] = {
    "image": {"scale": [0.5, 2.0], "size": [512, 1024]},
    "steps": {"scale": [0.5, 2.0, 0.1], "size": [512, 1024]},
    "size": {"scale": [0.1, 2.0], "relative_to": "size", "size": 64},
    "one scale": {"scale": [1.0, 1.0], "relative_to": "size", "size": [30, 17]},
}


def scaled_box(plan: ViewsConfig, sample_key: Key, view: int, width: int, height: int) -> Box:
    scale, left, top, _ = uniforms(sample_key, (0, view, 7, 0))
    low, high, *steps = plan.scale
    for step in steps:
        scale = low + step * math.floor(scale * (round((high - low) / step) + 1))
    if not steps:
        scale = low + (high - low) * scale
    rows, columns = (plan.size, plan.size) if isinstance(plan.size, int) else plan.size or (0, 0)
    pixels = max(width / columns, height / rows) if plan.relative_to == "size" else 1
    box_width, box_height = (min(max(round(side * (pixels / scale)), 1), 2**31 - 1) for side in (columns, rows))
    free = max(width - box_width, 0), max(height - box_height, 0)
    return [math.floor(left * (free[0] + 1)), math.floor(top * (free[1] + 1)), box_width, box_height]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("keys", SCALES.values(), ids=SCALES)
def test_scaled_boxes_and_their_flips(keys: dict[str, Any], size: tuple[int, int]) -> None:
    plan = ViewsConfig.model_validate({"kind": "scale_crop", "seed": 7, "flip": 0.3, "count": 50, **keys})
    boxes, flips, weights = sampled(plan, cases(size))
    for case, actual_box, flip in zip(cases(size), boxes, flips, strict=True):
        sample_key = key("view", 7, case.sample_id)
        assert actual_box == scaled_box(plan, sample_key, case.view, *size)
        assert flip == (uniforms(sample_key, (0, case.view, 1, 0))[0] < 0.3)
    assert weights == [1.0] * len(weights)


@pytest.mark.parametrize("num_ok", [1, 2, 3, 9, 255, 256])
@pytest.mark.parametrize(
    ("seed", "shard", "group", "view"), [(7, "train-00012", 0, 0), (7, "ä", 5, 49), (0, "s", 2**31, 65_534)]
)
def test_partners_are_neighbours_in_the_order_of_their_random_bits(
    num_ok: int, seed: int, shard: str, group: int, view: int
) -> None:
    plan = ViewsConfig(kind="function_matching", seed=seed)
    mix_key = key("mix", seed, shard)
    words = [word for block in range(64) for word in philox(mix_key, (block, group, view, 0))]
    order = sorted(range(num_ok), key=lambda row: words[row])
    expected = list(range(num_ok))
    for first, second in zip(order[0::2], order[1::2], strict=False):
        expected[first], expected[second] = second, first
    assert mix_partners(plan, shard, group, view, num_ok).tolist() == expected


def test_canaries_are_the_rows_whose_uniform_is_below_a_thousandth() -> None:
    names = [f"train-00000/{number:08d}" for number in range(3000)]
    flags = is_canary(sample_keys(5, names), np.full(len(names), 3))
    expected = [uniforms(key("view", 5, name), (0, 3, 2, 0))[0] < 0.001 for name in names]
    assert flags.tolist() == expected
    assert 0 < sum(expected) < 10
