"""topk: k logits within a logarithmic step, and the correct weight of the others at every temperature."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from pipeline.cache.format.codec import decode, encode, row_bytes
from tests.pipeline.cache.format.codec.kinds import (
    logits_output,
    round_trip,
    softmax,
    steps_error,
    stored,
    teacher_like,
)
from tests.tolerances import ulps


def ranked(row: NDArray[np.floating]) -> list[int]:
    """Classes by falling logit; Python sorts stably, so equal logits stay in the order of their classes."""
    return sorted(range(len(row)), key=lambda number: -row[number])


def level(others: NDArray[np.float64], temperature: float) -> float:
    """The logit that, given to each of the others, keeps the sum of their softmax weights."""
    top = others.max()
    return float(top + temperature * np.log(np.mean(np.exp((others - top) / temperature))))


@st.composite
def rows_and_k(draw: st.DrawFn) -> tuple[NDArray[np.float32], int]:
    width = draw(st.integers(2, 30))
    numbers = st.floats(-60_000, 60_000, width=32) | st.floats(-20, 20, width=32) | st.integers(-2, 2)
    return draw(arrays(np.float32, (2, width), elements=numbers)), draw(st.integers(1, width - 1))


@given(rows_and_k(), st.sampled_from([1.0, 2.0, 4.0, 10.0]))
def test_logits_and_level_err_by_a_step_at_most(case: tuple[NDArray[np.float32], int], temperature: float) -> None:
    values_NK, k = case
    decoded_NK = round_trip(values_NK, f"topk:{k}", temperature=temperature)
    for values, decoded in zip(values_NK.astype(np.float64), decoded_NK, strict=True):
        top, others = ranked(values)[:k], ranked(values)[k:]
        step = np.log1p((values[top[0]] - level(values[others], 10.0)) / 3) / 255
        # float16 rounds a step up by 2^-10 of it, or 2^-24; and the largest logit, which all others follow.
        step += step * 2.0**-10 + 2.0**-24
        shift = decoded[top[0]] - values[top[0]]
        assert abs(shift) <= abs(values[top[0]]) * 2.0**-11 + 2.0**-25
        # A level, T times the log of a mean of exponentials over the others, is K + 4 operations; interpolation is 4.
        slack = steps_error(values) + ulps(len(values) + 4, 10 * np.log(len(values))) + ulps(4, np.abs(values).max())
        # Half a step of log(1 + d / 3) at a distance of d; a full step next to the largest, which alone has code 0.
        expected = np.append(values[top], level(values[others], temperature))
        bound = (values[top[0]] - expected + 3) * np.expm1(step / 2) + 3 * np.expm1(step)
        assert (np.abs(np.append(decoded[top], decoded[others[0]]) - shift - expected) <= bound + slack).all()
        assert len(set(decoded[others])) == 1


@given(rows_and_k())
def test_no_class_overtakes_the_largest(case: tuple[NDArray[np.float32], int]) -> None:
    values_NK, k = case
    decoded_NK = round_trip(values_NK, f"topk:{k}", temperature=2.0)
    assert (decoded_NK.max(1) == decoded_NK[np.arange(2), values_NK.argmax(1)]).all()


def test_the_largest_class_stays_the_only_largest_however_close_the_next() -> None:
    values = np.zeros((1, 50), np.float32)
    values[0, [20, 3]] = [8.0, 7.9999]
    decoded = round_trip(values, "topk:2")
    assert decoded.argmax(1) == [20]
    assert decoded[0, 20] > decoded[0, 3]


@pytest.mark.parametrize("temperature", [1.0, 1.4, 2.0, 3.0, 4.0, 6.0, 10.0])
def test_the_others_preserve_their_softmax_weight_at_any_temperature(temperature: float) -> None:
    values_NK = teacher_like(50, 1000)
    decoded_NK = round_trip(values_NK, "topk:20", temperature=temperature)
    top = np.argsort(-values_NK, axis=1)[:, :20]
    exact, decoded = (
        np.take_along_axis(softmax(values, temperature), top, 1).sum(1) for values in (values_NK, decoded_NK)
    )
    np.testing.assert_allclose(decoded, exact, atol=0.015)


def test_beyond_the_stored_temperatures_the_nearest_level_is_used() -> None:
    values_NK = teacher_like(3, 40)
    for inside, outside in ((1.0, 0.3), (10.0, 50.0)):
        same = round_trip(values_NK, "topk:5", temperature=inside)
        assert np.array_equal(round_trip(values_NK, "topk:5", temperature=outside), same)


def test_a_row_is_top_step_levels_ids_and_codes() -> None:
    # The others are equal, so their level is the same at any temperature. log(1 + 255 / 3) / 255 = 0.0174681 is
    # between 1144 and 1145 times 2^-16; the step is the upper one, and log(1 + 27.75 / 3) = 133.2 of it.
    values = np.full((1, 300), -127.0, np.float32)
    values[0, [299, 7, 8]] = [128.0, 100.25, 100.25]
    expected = struct.pack("<2e4B3H3B", 128.0, 1145 * 2**-16, *[255] * 4, 299, 7, 8, 0, 133, 133)
    assert stored(values, "topk:3") == [expected]
    output = logits_output("topk:3", 300)
    decoded = decode(encode(values, output), output)
    near, far = (128 - 3 * math.expm1(code * 1145 * 2**-16) for code in (133, 255))
    # An error of the exponent, at most 5, weighs 258 times as much; then exp, factor and difference.
    error = ulps(5 + 3, 258)
    assert decoded[0, [299, 7, 8, 0, 298]].tolist() == pytest.approx([128.0, near, near, far, far], rel=0, abs=error)


def test_ties_go_to_the_lower_class_ids() -> None:
    values = np.array([[1, 3, 3, 3, 0, -0.0]], np.float32)
    (row,) = stored(values, "topk:2")
    assert list(row[8:10]) == [1, 2]
    (row,) = stored(values, "topk:5")
    assert list(row[8:13]) == [1, 2, 3, 0, 4]


@pytest.mark.parametrize(
    ("num_classes", "id_bytes"), [(2, 1), (256, 1), (257, 2), (65_536, 2), (65_537, 4), (70_000, 4)]
)
def test_ids_are_as_wide_as_the_number_of_classes_needs(num_classes: int, id_bytes: int) -> None:
    assert row_bytes(logits_output("topk:1", num_classes)) == 8 + id_bytes + 1


@pytest.mark.parametrize("value", [0.0, -3.25, 60_000.0])
def test_a_constant_row_stays_constant(value: float) -> None:
    decoded = round_trip(np.full((1, 9), value, np.float32), "topk:4", temperature=3.0)
    assert (decoded == np.float32(np.float16(value))).all()


def test_others_far_below_the_top_are_decoded() -> None:
    values = np.array([[0.0] + [-30_000] * 4, [0.0] + [-1e30] * 4], np.float32)
    decoded = round_trip(values, "topk:1", temperature=2.0)
    np.testing.assert_allclose(decoded[:, 1:], values[:, 1:], rtol=0.15)
