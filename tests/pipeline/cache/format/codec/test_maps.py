"""Maps [K,h,w]: one scale for a whole map in int8, and the rows of topk at every position in topk:k."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from pipeline.cache.format.codec import decode, depends_on_temperature, encode, has_maps, row_bytes, stored_outputs
from pipeline.core.errors import CacheError, ConfigError
from pipeline.tasks import OutputSpec
from schemas.cache_format import Output
from tests.errors import raises
from tests.pipeline.cache.format.codec.kinds import logits_output, round_trip

KINDS = ("fp32", "fp16", "int8", "topk:3")


def map_output(kind: str, shape: tuple[int, int, int]) -> Output:
    return stored_outputs([OutputSpec("logits", shape, kind)])[0]


def map_round_trip(values_NKhw: NDArray[np.float32], kind: str, *, temperature: float = 1.0) -> NDArray[np.float32]:
    _, num_classes, height, width = values_NKhw.shape
    output = map_output(kind, (num_classes, height, width))
    decoded = decode(encode(values_NKhw, output), output, temperature=temperature)
    assert (decoded.dtype, decoded.shape) == (np.float32, values_NKhw.shape)
    return decoded


def maps(limit: float = 60_000) -> st.SearchStrategy[NDArray[np.float32]]:
    shapes = st.tuples(st.integers(1, 2), st.integers(4, 9), st.integers(1, 4), st.integers(1, 5))
    numbers = st.floats(-limit, limit, width=32) | st.floats(-20, 20, width=32) | st.integers(-2, 2)
    return shapes.flatmap(lambda shape: arrays(np.float32, shape, elements=numbers))


@given(maps(limit=2.0**126))
def test_int8_errs_by_half_a_255th_of_the_span_of_the_map(values_NKhw: NDArray[np.float32]) -> None:
    exact = values_NKhw.astype(np.float64)
    span_N = exact.max((1, 2, 3), keepdims=True) - exact.min((1, 2, 3), keepdims=True)
    # As for rows: three roundings of float32, and 255 halves of its smallest number.
    rounding = np.abs(exact).max((1, 2, 3), keepdims=True) * 2.0**-21 + 255 * 2.0**-149
    assert (np.abs(map_round_trip(values_NKhw, "int8") - exact) <= span_N / 510 + rounding).all()


@given(maps(), st.sampled_from([1.0, 3.0, 10.0]))
def test_a_position_of_topk_is_a_row_of_topk(values_NKhw: NDArray[np.float32], temperature: float) -> None:
    """Whose error bound `test_topk` derives."""
    decoded_NKhw = map_round_trip(values_NKhw, "topk:3", temperature=temperature)
    rows_PK = values_NKhw.transpose(0, 2, 3, 1).reshape(-1, values_NKhw.shape[1])
    expected_PK = round_trip(rows_PK, "topk:3", temperature=temperature)
    assert np.array_equal(decoded_NKhw.transpose(0, 2, 3, 1).reshape(expected_PK.shape), expected_PK)


@given(maps())
def test_no_class_overtakes_the_largest_of_its_position(values_NKhw: NDArray[np.float32]) -> None:
    decoded_NKhw = map_round_trip(values_NKhw, "topk:1")
    largest_N1hw = np.take_along_axis(decoded_NKhw, values_NKhw.argmax(1)[:, None], 1)
    assert np.array_equal(largest_N1hw[:, 0], decoded_NKhw.max(1))


def test_a_row_of_topk_has_planes_of_positions() -> None:
    # Two positions side by side. As in test_topk: the step is 1145 · 2⁻¹⁶, and 27.75 below the top is code 133.
    values = np.full((1, 300, 1, 2), -127.0, np.float32)
    values[0, [299, 7, 8], 0, 0] = [128.0, 100.25, 100.25]
    values[0, [4, 280, 5], 0, 1] = [128.0, 100.25, 100.25]
    output = map_output("topk:3", (300, 1, 2))
    top, step = (128.0, 128.0), (1145 * 2**-16,) * 2
    levels, ids, codes = (255,) * 8, (299, 4, 7, 5, 8, 280), (0, 0, 133, 133, 133, 133)
    expected = struct.pack("<4e8B6H6B", *top, *step, *levels, *ids, *codes)
    assert encode(values, output).to_pylist() == [expected]
    assert [(field.name, field.dtype, field.count) for field in output.fields] == [
        ("top", "<f2", 2),
        ("step", "<f2", 2),
        ("levels", "|u1", 8),
        ("ids", "<u2", 6),
        ("codes", "|u1", 6),
    ]


def test_a_map_takes_the_bytes_of_the_table_of_the_format() -> None:
    cityscapes, ade20k = (19, 64, 128), (150, 64, 64)
    assert row_bytes(map_output("fp16", cityscapes)) == 2 * 19 * 64 * 128
    assert row_bytes(map_output("int8", cityscapes)) == 8 + 19 * 64 * 128
    assert row_bytes(map_output("topk:5", ade20k)) == (8 + 5 + 5) * 64 * 64


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_does_not_depend_on_the_other_maps(kind: str) -> None:
    values = np.random.default_rng(0).normal(0, 4, (5, 6, 3, 4)).astype(np.float32)
    output = map_output(kind, (6, 3, 4))
    alone = [encode(values[number : number + 1], output)[0].as_py() for number in range(5)]
    assert encode(values, output).to_pylist() == alone
    assert np.array_equal(decode(encode(values, output).slice(2, 2), output), map_round_trip(values, kind)[2:4])


@pytest.mark.parametrize("kind", ["int8t", "int4", "sampled:3@1", "head"])
def test_encodings_of_one_row_refuse_a_map(kind: str) -> None:
    with raises("config.encoding-of-maps", ConfigError, got=kind, expected="fp32, fp16, int8, topk:k"):
        map_output(kind, (300, 2, 2))


def test_topk_needs_more_classes_and_not_more_positions() -> None:
    with raises("config.too-few-classes", ConfigError, got="3 classes", expected="at least 4"):
        map_output("topk:3", (3, 8, 8))


@pytest.mark.parametrize("kind", ["fp16", "topk:2"])
def test_a_position_that_does_not_fit_stops_with_the_key_of_its_map(kind: str) -> None:
    values = np.zeros((2, 4, 2, 2), np.float32)
    values[1, 2, 1, 0] = 1e6
    with pytest.raises(CacheError, match=r"cache\.values-do-not-fit[\s\S]*keys two\n[\s\S]*1 rows[\s\S]*logits=fp32"):
        encode(values, map_output(kind, (4, 2, 2)), keys=["one", "two"])


def test_only_topk_of_maps_depends_on_the_temperature() -> None:
    for kind in KINDS:
        output = map_output(kind, (4, 2, 2))
        assert depends_on_temperature(output) == (kind == "topk:3")
        assert has_maps([logits_output("fp16", 4), output])
    assert not has_maps([logits_output("fp16", 4)])
