"""int8: an error of at most half a step, and the exact smallest number."""

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
from tests.pipeline.cache.format.codec.kinds import logits_output, round_trip, stored

# Half of float32's range: beyond it a row may span more than float32 holds.
LIMIT = 2.0**126


def matrices(limit: float) -> st.SearchStrategy[NDArray[np.float32]]:
    shapes = st.tuples(st.integers(1, 5), st.integers(2, 40))
    numbers = st.floats(-limit, limit, width=32) | st.floats(-30, 30, width=32)
    return shapes.flatmap(lambda shape: arrays(np.float32, shape, elements=numbers))


@given(matrices(LIMIT))
def test_the_error_is_half_a_step_of_a_255th_of_the_row(values_NK: NDArray[np.float32]) -> None:
    exact = values_NK.astype(np.float64)
    step_N1 = (exact.max(1, keepdims=True) - exact.min(1, keepdims=True)) / 255
    # In addition to the half step: roundings of float32 in step, product and sum, and 255 halves of its smallest
    # number.
    rounding = np.abs(exact).max(1, keepdims=True) * 2.0**-21 + 255 * 2.0**-149
    assert (np.abs(round_trip(values_NK, "int8") - exact) <= step_N1 / 2 + rounding).all()


@given(st.floats(-(2.0**127), 2.0**127, width=32), st.integers(2, 9))
def test_a_constant_row_is_decoded_exactly(value: float, width: int) -> None:
    values = np.full((2, width), value, np.float32)
    assert (round_trip(values, "int8") == values).all()


@given(matrices(2.0**100))
def test_the_smallest_number_is_decoded_exactly(values_NK: NDArray[np.float32]) -> None:
    lowest = values_NK == values_NK.min(1, keepdims=True)
    assert (round_trip(values_NK, "int8")[lowest] == values_NK[lowest]).all()


def test_a_row_is_offset_scale_and_one_byte_a_number() -> None:
    row = np.array([[2.0, 2.5, 129.5, 0.0, 127.5 * 2]], np.float32)
    # A step of one: halves are rounded to even.
    assert stored(row, "int8") == [struct.pack("<ff5B", 0.0, 1.0, 2, 2, 130, 0, 255)]
    assert row_bytes(logits_output("int8", 5)) == 13


def test_rows_of_denormals_preserve_their_order_of_magnitude() -> None:
    values = np.array([[0.0, 1e-45, 3e-43, 1e-40]], np.float32)
    assert np.abs(round_trip(values, "int8") - values).max() <= 1e-40 / 510 + 255 * 1.4e-45


def test_a_row_that_spans_more_than_float32_holds_is_refused() -> None:
    with pytest.raises(CacheError, match=r"cache\.values-do-not-fit[\s\S]*keys b\n[\s\S]*1 rows[\s\S]*logits=fp32"):
        encode(np.array([[0, 1], [-3e38, 3e38]], np.float32), logits_output("int8", 2), keys=["a", "b"])
