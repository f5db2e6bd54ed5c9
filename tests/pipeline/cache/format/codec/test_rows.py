"""Stored numbers are decoded within the error bound of their type, and numbers that do not fit are refused."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from pipeline.cache.format.codec import decode, depends_on_temperature, encode, row_bytes, stored_outputs
from pipeline.core.errors import CacheError, ConfigError
from pipeline.tasks import OutputSpec
from pipeline.tasks.classification import Classification
from schemas.config import CacheConfig
from tests.errors import raises
from tests.pipeline.cache.format.codec.kinds import (
    encoded,
    identity_of,
    logits_output,
    round_trip,
    stored,
    teacher_like,
)

HALF_MAX, SINGLE_MAX = 65_504.0, float(np.finfo(np.float32).max)


KINDS = ("fp32", "fp16", "int8", "int8t", "int4", "topk:3", "sampled:3@1")


def matrices(limit: float) -> st.SearchStrategy[NDArray[np.float32]]:
    shapes = st.tuples(st.integers(1, 9), st.integers(1, 7))
    return shapes.flatmap(lambda shape: arrays(np.float32, shape, elements=st.floats(-limit, limit, width=32)))


@given(matrices(SINGLE_MAX))
def test_fp32_is_decoded_bit_for_bit(values_ND: NDArray[np.float32]) -> None:
    kind = logits_output("fp32", values_ND.shape[1])
    assert decode(encode(values_ND, kind), kind).tobytes() == values_ND.tobytes()


@given(matrices(HALF_MAX))
def test_fp16_errs_by_at_most_half_a_unit_in_the_last_place(values_ND: NDArray[np.float32]) -> None:
    # 11 significant bits; below 2^-14 the spacing is that of subnormals, 2^-24.
    bound = np.maximum(np.abs(values_ND.astype(np.float64)) * 2.0**-11, 2.0**-25)
    assert (np.abs(round_trip(values_ND, "fp16") - values_ND) <= bound).all()


@pytest.mark.parametrize("kind", ["fp16", "int4", "topk:1"])
@given(st.floats(65_520, SINGLE_MAX, width=32))
def test_a_largest_number_that_would_be_infinite_in_fp16_is_refused(kind: str, value: float) -> None:
    values = teacher_like(3, 258)
    values[1, 7] = value
    with pytest.raises(CacheError, match=r"cache\.values-do-not-fit[\s\S]*keys two\n[\s\S]*cache.logits=fp32"):
        encode(values, logits_output(kind, 258), keys=["one", "two", "three"])


def test_a_number_below_the_range_of_fp16_is_refused() -> None:
    with pytest.raises(CacheError, match=r"cache\.values-do-not-fit"):
        encode(np.array([[0.0, -65_520]], np.float32), logits_output("fp16", 2))


@pytest.mark.parametrize("num_classes", [256, 257, 65_536, 65_537])
@pytest.mark.parametrize("kind", ["int8t", "int4", "topk:1", "sampled:2@1"])
def test_the_last_of_many_classes_is_decoded(kind: str, num_classes: int) -> None:
    values = teacher_like(2, num_classes)
    values[:, -1] = 50
    assert (round_trip(values, kind).argmax(1) == num_classes - 1).all()


@pytest.mark.parametrize(
    ("kind", "num_classes", "minimum"),
    [("int8t", 255, 256), ("int4", 100, 128), ("topk:10", 10, 11), ("topk:11", 10, 12), ("sampled:10@4", 10, 11)],
)
def test_too_few_classes_are_refused(kind: str, num_classes: int, minimum: int) -> None:
    got, expected = f"{num_classes} classes", f"at least {minimum}"
    with raises("config.too-few-classes", ConfigError, got=got, expected=expected) as caught:
        logits_output(kind, num_classes)
    assert "cache.logits=int8" in str(caught.value.next_step)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_no_encoding_takes_nan_or_infinity(kind: str, value: float) -> None:
    values = teacher_like(3, 258)
    values[1, values[1].argmin()] = value
    with pytest.raises(CacheError, match=r"cache\.values-do-not-fit[\s\S]*keys two\n[\s\S]*got: +1 rows"):
        encode(values, logits_output(kind, 258), keys=["one", "two", "three"], identity=identity_of(values))


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_decodes_to_the_slice(kind: str) -> None:
    output, values = logits_output(kind, 258), teacher_like(7, 258)
    column = encoded(values, output)
    rows = decode(column, output)
    for start, stop in ((0, 7), (2, 5), (6, 7), (3, 3)):
        assert np.array_equal(decode(column.slice(start, stop - start), output), rows[start:stop])
    chunks = pa.chunked_array([column.slice(2, 3), column])
    assert np.array_equal(decode(chunks, output), np.concatenate([rows[2:5], rows]))


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_of_any_shape_is_stored_as_its_numbers_in_order(kind: str) -> None:
    values = teacher_like(3, 264)
    (output,) = stored_outputs([OutputSpec("tokens", (22, 12), kind)])
    column = encoded(values.reshape(3, 22, 12), output)
    assert (output.shape, column.to_pylist()) == ((22, 12), stored(values, kind))
    assert np.array_equal(decode(column, output), round_trip(values, kind).reshape(3, 22, 12))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_other_rows(kind: str) -> None:
    values = teacher_like(9, 259)
    assert stored(values, kind) == [row for number in range(9) for row in stored(values[number : number + 1], kind)]


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_encode_to_no_rows_and_back(kind: str) -> None:
    output = logits_output(kind, 258)
    column = encoded(np.empty((0, 258), np.float32), output)
    assert column.type == pa.binary(row_bytes(output))
    assert decode(column, output).shape == (0, 258)
    assert decode(pa.chunked_array([], column.type), output).shape == (0, 258)


def test_only_topk_depends_on_the_temperature() -> None:
    values = teacher_like(4, 258)
    for kind in set(KINDS) - {"sampled:3@1"}:
        cold, hot = (round_trip(values, kind, temperature=temperature) for temperature in (1.0, 4.0))
        assert depends_on_temperature(logits_output(kind, 258)) == (kind == "topk:3") != np.array_equal(cold, hot)


def test_rows_are_little_endian_and_dense() -> None:
    assert stored(np.array([[1.0, -2.0]], np.float32), "fp16") == [bytes.fromhex("003c00c0")]
    assert row_bytes(logits_output("fp16", 2)) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_fields_of_an_output_are_its_row(kind: str) -> None:
    output = logits_output(kind, 258)
    assert sum(np.dtype(field.dtype).itemsize * field.count for field in output.fields) == row_bytes(output)
    assert {np.dtype(field.dtype).byteorder for field in output.fields} <= {"<", "=", "|"}


def test_an_empty_cell_is_refused() -> None:
    with pytest.raises(CacheError, match=r"cache\.empty-cells\] column logits"):
        decode(pa.array([b"1234", None], pa.binary(4)), logits_output("fp16", 2))


def test_an_unknown_encoding_is_refused_by_name() -> None:
    output = logits_output("fp16", 2).model_copy(update={"encoding": "wavelet"})
    names = dict.fromkeys(logits_output(kind, 258).encoding for kind in (*KINDS, "head")) | {"topk_map": None}
    for call in (lambda: decode(pa.array([b"1234"], pa.binary(4)), output), lambda: depends_on_temperature(output)):
        with raises("cache.unknown-encoding", CacheError, got="wavelet", expected=", ".join(names)):
            call()


def test_only_stored_outputs_are_listed() -> None:
    def listed(logits: str, embeddings: str) -> list[tuple[str, tuple[int, ...], str, str]]:
        config = CacheConfig.model_validate({"url": "x", "logits": logits, "embeddings": embeddings})
        outputs = stored_outputs(Classification().outputs(config, {"logits": 10, "embedding": 4}))
        return [(item.name, item.shape, item.dtype, item.encoding) for item in outputs]

    assert listed("fp16", "none") == [("logits", (10,), "float16", "dense")]
    assert listed("none", "int8") == [("embedding", (4,), "uint8", "int8")]
    assert listed("topk:3", "fp16") == [
        ("logits", (10,), "uint8", "topk"),
        ("embedding", (4,), "float16", "dense"),
    ]
    assert listed("none", "none") == []
