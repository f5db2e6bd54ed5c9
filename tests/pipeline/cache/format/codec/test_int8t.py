"""int8t: twelve logits in float16 above the thirteenth, half a step of error below it, and one largest class."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from pipeline.cache.format.codec import encode, row_bytes
from pipeline.core.errors import CacheError
from tests.errors import raises
from tests.pipeline.cache.format.codec.kinds import logits_output, round_trip, softmax, stored, teacher_like

# Of a product and of a sum or difference in float32.
ROUNDING = 2.0**-22


def matrices() -> st.SearchStrategy[NDArray[np.float32]]:
    """Few different numbers beside any: rows with ties among the largest, and constant rows."""
    numbers = st.floats(-1e4, 1e4, width=32) | st.integers(-2, 2)
    return arrays(np.float32, (2, 256), elements=numbers, fill=st.sampled_from([-3.0, 0.0, 1e4]))


def ranked(values: NDArray[np.float32]) -> list[int]:
    """Classes by descending logit. Python sorts stably: equal logits stay in the order of their classes."""
    return sorted(range(len(values)), key=lambda number: -values[number])


@given(matrices())
def test_the_largest_is_the_only_largest_after_decoding(values_NK: NDArray[np.float32]) -> None:
    for values, decoded in zip(values_NK, round_trip(values_NK, "int8t"), strict=True):
        first = ranked(values)[0]
        assert (np.delete(decoded, first) < decoded[first]).all()


@given(matrices())
def test_the_others_of_twelve_err_by_float16_and_the_rest_by_half_a_step(values_NK: NDArray[np.float32]) -> None:
    for values, decoded in zip(values_NK.astype(np.float64), round_trip(values_NK, "int8t"), strict=True):
        order = ranked(values.astype(np.float32))
        exact, rest = order[:12], order[12:]
        above, below = values[exact] - values[rest[0]], values[rest[0]] - values[rest].min()
        rounding = ROUNDING * np.abs(values).max()
        # The first may have been raised by one step of float16 at the distance of the second, to differ from it.
        spacing = np.maximum(above, 2.0**-14) * 2.0**-11
        bound = np.where(np.arange(12) == 0, 3 * spacing, spacing) + 2 * rounding
        assert (np.abs(decoded[exact] - values[exact]) <= bound).all()
        assert (np.abs(decoded[rest] - values[rest]) <= below / 510 + 2 * rounding).all()


def test_a_row_is_next_scale_ids_distances_and_a_byte_a_class() -> None:
    # 255 steps of a quarter below the thirteenth logit, which is -1.
    values = np.full((1, 300), -1 - 255 / 4, np.float32)
    values[0, 20:32] = np.arange(12, 0, -1)
    values[0, [3, 299, 7]] = [-1, -1.25, -1.3]
    (row,) = stored(values, "int8t")
    assert len(row) == row_bytes(logits_output("int8t", 300)) == 4 + 4 + 24 + 24 + 300
    assert row[:8] == struct.pack("<ff", -1, 0.25)
    assert np.frombuffer(row, "<u2", 12, 8).tolist() == list(range(20, 32))
    assert np.frombuffer(row, "<f2", 12, 32).tolist() == list(range(13, 1, -1))
    codes = np.frombuffer(row, np.uint8, 300, 56)
    assert codes[[3, 299, 7]].tolist() == [0, 1, 1]
    assert set(codes[20:32]) == {0}
    assert set(np.delete(codes, [3, 7, 299, *range(20, 32)])) == {255}
    decoded = round_trip(values, "int8t")
    assert decoded[0, [20, 31, 3, 299, 7, 0]].tolist() == [12, 1, -1, -1.25, -1.25, -64.75]


@pytest.mark.parametrize("offset", [0.0, 10.0, -1e6])
def test_of_equal_logits_the_lower_class_becomes_the_only_largest(offset: float) -> None:
    values = np.full((1, 256), offset, np.float32)
    values[0, [9, 40, 41]] += 3
    decoded = round_trip(values, "int8t")[0]
    assert np.flatnonzero(decoded == decoded.max()).tolist() == [9]
    # Raised by at most one step, of float32 at the logit or of float16 at the distance.
    step = max(float(np.spacing(np.float32(abs(offset) + 3))), 2.0**-9)
    assert 0 < decoded[9] - decoded[40] <= step
    assert (np.delete(decoded, 9) == np.delete(values[0], 9)).all()


def test_constant_rows_stay_constant_but_for_the_first_class() -> None:
    values = np.array([[0.0], [7.25], [-3e4]], np.float32).repeat(256, axis=1)
    decoded = round_trip(values, "int8t")
    assert (decoded[:, 1:] == values[:, 1:]).all()
    assert (decoded[:, 0] - values[:, 0] > 0).all()
    assert (decoded[:, 0] - values[:, 0] <= np.spacing(np.abs(values[:, 0])) + 2.0**-24).all()


def test_ids_take_two_bytes_beyond_256_classes_and_four_beyond_65536() -> None:
    sizes = {width: row_bytes(logits_output("int8t", width)) for width in (256, 257, 1000, 65_537)}
    assert sizes == {256: 44 + 256, 257: 56 + 257, 1000: 1056, 65_537: 80 + 65_537}


@pytest.mark.parametrize("raised", [66_000.0, 3e38])
def test_a_logit_that_float16_does_not_reach_above_the_thirteenth_is_refused(raised: float) -> None:
    values = np.zeros((2, 256), np.float32)
    values[1, 5] = raised
    with raises("cache.values-do-not-fit", CacheError, got=f"1 rows, largest magnitude {raised:.4g}") as caught:
        encode(values, logits_output("int8t", 256), keys=["one", "two"])
    assert (caught.value.where, caught.value.next_step) == ("keys two", "set cache.logits=fp32")


def test_a_constant_row_that_no_float16_can_raise_is_refused() -> None:
    with raises("cache.values-do-not-fit", CacheError):
        encode(np.full((1, 256), 1e30, np.float32), logits_output("int8t", 256))


def test_it_is_closer_than_int8_at_every_temperature() -> None:
    values = teacher_like(200, 1000)

    def divergence(kind: str, temperature: float) -> float:
        p = softmax(values, temperature)
        q = softmax(round_trip(values, kind), temperature)
        return float((p * np.log(p / q)).sum(1).mean())

    for temperature in (1.0, 2.0, 4.0):
        assert divergence("int8t", temperature) < divergence("int8", temperature)
