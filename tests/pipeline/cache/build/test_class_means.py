"""Class sums are exact: the same bits for any partition and order, and equal to a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.cache.build.class_means import (
    ClassSums,
    decode_means,
    decode_sums,
    encode_means,
    encode_sums,
    merge,
    sum_rows,
)
from pipeline.core.errors import CacheError
from tests.tolerances import ulps

NUM_CLASSES, DIM = 5, 3


def rows(seed: int, count: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, NUM_CLASSES, count)
    return random.normal(0, 3, (count, DIM)).astype(np.float32), labels.astype(np.int32)


def means_of(sums: ClassSums) -> NDArray[np.float32]:
    data = encode_means(sums, fingerprint="f")
    return decode_means(data, num_classes=NUM_CLASSES, fingerprint="f", where="here").mean_KD


@given(st.integers(0, 99), st.integers(1, 60))
def test_means_equal_a_float64_loop(seed: int, count: int) -> None:
    embedding_ND, label_N = rows(seed, count)
    mean_KD = means_of(sum_rows(embedding_ND, label_N))
    for label in range(NUM_CLASSES):
        total, number = np.zeros(DIM), 0
        for row in range(count):
            if label_N[row] == label:
                total, number = total + embedding_ND[row].astype(np.float64), number + 1
        # Fixed point rounds each row to 2^-25; the mean is then rounded to fp32.
        expected = total / number if number else np.full(DIM, np.nan)
        np.testing.assert_allclose(mean_KD[label], expected, rtol=ulps(1), atol=2.0**-25)


@given(st.integers(0, 99), st.integers(1, 60), st.lists(st.integers(0, 60), max_size=6), st.randoms())
def test_any_partition_in_any_order_gives_the_same_bytes(seed: int, count: int, ends: list[int], random) -> None:
    embedding_ND, label_N = rows(seed, count)
    splits = np.split(np.arange(count), sorted(end for end in ends if end < count))
    parts = [sum_rows(embedding_ND[split], label_N[split]) for split in splits]
    random.shuffle(parts)
    half = len(parts) // 2
    tree = [merge(some) for some in (parts[:half], parts[half:]) if some]
    expected = encode_sums(sum_rows(embedding_ND, label_N))
    assert encode_sums(merge(parts)) == expected
    assert encode_sums(merge(tree)) == expected


@given(st.integers(0, 99), st.integers(0, 20))
def test_stored_sums_are_read_unchanged(seed: int, count: int) -> None:
    sums = sum_rows(*rows(seed, count))
    decoded = decode_sums(encode_sums(sums), where="here")
    assert np.array_equal(decoded.class_C, sums.class_C)
    assert np.array_equal(decoded.count_C, sums.count_C)
    assert np.array_equal(decoded.sum_CD, sums.sum_CD)


def test_only_classes_that_occur_are_stored() -> None:
    sums = sum_rows(np.ones((2, DIM), np.float32), np.array([4, 2], np.int32))
    assert sums.class_C.tolist() == [2, 4]
    assert sums.count_C.tolist() == [1, 1]


def test_no_labelled_row_leaves_every_mean_empty() -> None:
    mean_KD = means_of(sum_rows(np.ones((0, DIM), np.float32), np.empty(0, np.int32)))
    assert mean_KD.shape == (NUM_CLASSES, DIM)
    assert np.isnan(mean_KD).all()


@pytest.mark.parametrize("magnitude", [2.0**38, 3e38])
def test_an_embedding_beyond_the_fixed_point_is_refused(magnitude: float) -> None:
    with pytest.raises(CacheError, match=r"cache\.class-sums-overflow"):
        sum_rows(np.full((1, DIM), magnitude, np.float32), np.zeros(1, np.int32))


def test_rows_that_fit_alone_and_overflow_together_are_refused() -> None:
    embedding_ND = np.full((8, DIM), 2.0**37, np.float32)
    with pytest.raises(CacheError, match=r"cache\.class-sums-overflow"):
        sum_rows(embedding_ND, np.zeros(8, np.int32))


def test_sums_that_fit_alone_and_overflow_together_are_refused() -> None:
    part = sum_rows(np.full((1, DIM), 2.0**37, np.float32), np.zeros(1, np.int32))
    with pytest.raises(CacheError, match=r"cache\.class-sums-overflow"):
        merge([part] * 8)


def test_another_teachers_means_are_refused() -> None:
    data = encode_means(sum_rows(*rows(0, 9)), fingerprint="old")
    with pytest.raises(CacheError, match=r"cache\.class-means-of-another-teacher[\s\S]*got: +old[\s\S]*expected: +new"):
        decode_means(data, num_classes=NUM_CLASSES, fingerprint="new", where="here")


def test_means_that_do_not_fit_the_classes_of_the_header_are_refused() -> None:
    sums = ClassSums(np.array([0, 3], np.int32), np.array([1, 1]), np.ones((2, 2), np.int64))
    data = encode_means(sums, fingerprint="f")
    assert np.isnan(decode_means(data, num_classes=4, fingerprint="f", where="here").mean_KD).all(1).sum() == 2
    for num_classes in (3, 1_000_000_000):
        with pytest.raises(CacheError, match=r"cache\.invalid-class-means"):
            decode_means(data, num_classes=num_classes, fingerprint="f", where="here")


def test_bytes_that_are_not_parquet_are_refused() -> None:
    with pytest.raises(CacheError, match=r"cache\.unreadable-parquet"):
        decode_sums(b"PAR1, but not really", where="here")
