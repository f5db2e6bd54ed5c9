"""int4: sixteen logits in float16, and an error of at most half a logarithmic step for the others."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from pipeline.cache.format.codec import row_bytes
from tests.pipeline.cache.format.codec.kinds import logits_output, round_trip, steps_error, stored
from tests.tolerances import ulps


def matrices() -> st.SearchStrategy[NDArray[np.float32]]:
    return st.integers(128, 131).flatmap(
        lambda width: arrays(np.float32, (2, width), elements=st.floats(-1e4, 1e4, width=32) | st.integers(-2, 2))
    )


@pytest.mark.slow
@given(matrices())
def test_the_largest_sixteen_are_float16_and_the_others_err_by_half_a_step(values_NK: NDArray[np.float32]) -> None:
    decoded_NK = round_trip(values_NK, "int4")
    for values, decoded in zip(values_NK, decoded_NK, strict=True):
        # Python sorts stably: equal logits stay in the order of their classes.
        ranked = sorted(range(len(values)), key=lambda number: -values[number])
        exact, rest = ranked[:16], ranked[16:]
        assert (decoded[exact] == values[exact].astype(np.float16)).all()
        below = values[rest[0]].astype(np.float64) - values[rest]
        half = np.log1p(below.max() / 3) / 30
        # Half a step of log(1 + d / 3), upwards or downwards; upwards is more.
        bound = (below + 3) * np.expm1(half)
        assert (np.abs(decoded[rest] - values[rest]) <= bound + steps_error(values.astype(np.float64))).all()


def test_a_row_is_next_step_ids_logits_and_half_a_byte_a_class() -> None:
    # Steps of a third of log 2: three codes double d + 3. So 15 codes span 96 = 3 * 2**5, less the 3.
    values = np.full((1, 131), -93.0, np.float32)
    values[0, 100:116] = np.arange(32, 16, -1)
    values[0, [0, 1, 2, 130]] = [0, -3, -9, -45]
    (row,) = stored(values, "int4")
    assert len(row) == row_bytes(logits_output("int4", 131)) == 4 + 4 + 16 + 32 + 66
    assert np.frombuffer(row, "<f4", 2).tolist() == pytest.approx([0.0, np.log(2) / 3], rel=ulps(3))
    assert list(row[8:24]) == list(range(100, 116))
    assert np.frombuffer(row, "<f2", 16, 24).tolist() == list(range(32, 16, -1))
    codes = row[56:]
    # The even class is the low half of a byte. Classes with exact logits have code 0, as has the last half byte.
    assert list(codes[:2]) == [0 | 3 << 4, 6 | 15 << 4]
    assert set(codes[2:50]) == set(codes[58:65]) == {15 | 15 << 4}
    assert set(codes[50:58]) == {0}
    assert codes[65] == 12
    decoded = round_trip(values, "int4")
    error = steps_error(values[0].astype(np.float64))
    assert decoded[0, [0, 1, 2, 3, 130]].tolist() == pytest.approx([0, -3, -9, -93, -45], rel=0, abs=error)


def test_ids_take_two_bytes_beyond_256_classes_and_four_beyond_65536() -> None:
    sizes = {width: row_bytes(logits_output("int4", width)) for width in (256, 258, 65_536, 65_538)}
    assert sizes == {256: 184, 258: 201, 65_536: 72 + 32_768, 65_538: 104 + 32_769}


def test_int8_takes_no_more_bytes_with_fewer_classes_than_int4_allows() -> None:
    assert row_bytes(logits_output("int4", 128)) <= row_bytes(logits_output("int8", 128))
