"""Stored numbers come back within the error that their type states, and what does not fit is refused."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from pipeline.cache.codec import arrow_type, decode, encode, outputs_of, row_bytes
from pipeline.errors import CacheError
from schemas.config import CacheConfig
from schemas.manifest import Output

HALF_MAX, SINGLE_MAX = 65_504.0, float(np.finfo(np.float32).max)


def output(width: int, dtype: str) -> Output:
    return Output.model_validate({"name": "logits", "shape": (width,), "dtype": dtype, "encoding": "dense"})


def matrices(limit: float) -> st.SearchStrategy[NDArray[np.float32]]:
    shapes = st.tuples(st.integers(1, 9), st.integers(1, 7))
    return shapes.flatmap(lambda shape: arrays(np.float32, shape, elements=st.floats(-limit, limit, width=32)))


@given(matrices(SINGLE_MAX))
def test_fp32_comes_back_bit_for_bit(values_ND: NDArray[np.float32]) -> None:
    stored = decode(encode(values_ND, output(values_ND.shape[1], "float32")), output(values_ND.shape[1], "float32"))
    assert stored.tobytes() == values_ND.tobytes()


@given(matrices(HALF_MAX))
def test_fp16_errs_by_at_most_half_a_unit_in_the_last_place(values_ND: NDArray[np.float32]) -> None:
    kind = output(values_ND.shape[1], "float16")
    stored = decode(encode(values_ND, kind), kind).astype(np.float64)
    # 11 significant bits; below 2^-14 the spacing is that of subnormals, 2^-24.
    bound = np.maximum(np.abs(values_ND.astype(np.float64)) * 2.0**-11, 2.0**-25)
    assert (np.abs(stored - values_ND) <= bound).all()


@given(st.floats(65_520, SINGLE_MAX, width=32), st.sampled_from([-1, 1]))
def test_what_would_be_infinite_in_fp16_is_refused(value: float, sign: int) -> None:
    with pytest.raises(CacheError, match=r"do not fit float16[\s\S]*cache.logits=fp32"):
        encode(np.array([[0.0, sign * value]], np.float32), output(2, "float16"))


@given(matrices(1e4), st.data())
def test_a_slice_decodes_to_the_slice(values_ND: NDArray[np.float32], data: st.DataObject) -> None:
    kind = output(values_ND.shape[1], "float32")
    start = data.draw(st.integers(0, len(values_ND)))
    stop = data.draw(st.integers(start, len(values_ND)))
    column = encode(values_ND, kind).slice(start, stop - start)
    assert np.array_equal(decode(column, kind), values_ND[start:stop])
    assert np.array_equal(decode(pa.chunked_array([column, column]), kind), np.concatenate([values_ND[start:stop]] * 2))


def test_rows_are_little_endian_and_dense() -> None:
    column = encode(np.array([[1.0, -2.0]], np.float32), output(2, "float16"))
    assert column.to_pylist() == [bytes.fromhex("003c00c0")]
    assert arrow_type(output(2, "float16")) == pa.binary(4) == pa.binary(row_bytes(output(2, "float16")))


def test_no_rows_decode_to_no_rows() -> None:
    kind = output(3, "float16")
    assert decode(pa.chunked_array([], arrow_type(kind)), kind).shape == (0, 3)


def test_an_empty_cell_is_refused() -> None:
    with pytest.raises(CacheError, match="1 rows have no logits"):
        decode(pa.array([b"1234", None], pa.binary(4)), output(2, "float16"))


def test_only_the_outputs_that_are_kept_are_listed() -> None:
    config = CacheConfig.model_validate({"url": "x", "logits": "fp16", "embeddings": "none"})
    assert [(item.name, item.shape, item.dtype) for item in outputs_of(config, num_classes=10, embedding_dim=4)] == [
        ("logits", (10,), "float16")
    ]
    config = CacheConfig.model_validate({"url": "x", "logits": "fp32", "embeddings": "fp16"})
    assert [(item.name, item.shape, item.dtype) for item in outputs_of(config, num_classes=10, embedding_dim=4)] == [
        ("logits", (10,), "float32"),
        ("embedding", (4,), "float16"),
    ]
