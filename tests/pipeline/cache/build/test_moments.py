"""Moments equal numpy's, and have the same bits for any BLAS, any threads and any order of arrival."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.cache.build import moments
from pipeline.cache.build.moments import (
    BLOCK_ROWS,
    MergeTree,
    MomentSums,
    decode_moments,
    encode_moments,
    merge,
    moment_sums,
)
from pipeline.core.errors import CacheError
from tests.errors import raises


def rows(seed: int, num_rows: int, dim: int) -> NDArray[np.float32]:
    """Dimensions with means and scales of very different size, some constant, correlated."""
    random = np.random.default_rng(seed)
    values_ND = random.normal(size=(num_rows, dim)) @ random.normal(size=(dim, dim))
    scale_D = 10.0 ** random.integers(-6, 6, dim)
    scale_D[0] = 0
    return (values_ND * scale_D + random.normal(size=dim) * 50 * scale_D.clip(1)).astype(np.float32)


def sums_of(values_ND: NDArray[np.float32]) -> MomentSums:
    blocks = [*moment_sums(values_ND, np.zeros(len(values_ND), bool))]
    total = blocks[0]
    for block in blocks[1:]:
        total = merge(total, block)
    return total


def same_bits(first: MomentSums | None, second: MomentSums | None) -> bool:
    assert first is not None
    assert second is not None
    arrays = (first.mean_D, second.mean_D), (first.scatter_DD, second.scatter_DD)
    return first.num_rows == second.num_rows and all(one.tobytes() == other.tobytes() for one, other in arrays)


@given(st.integers(0, 99), st.integers(2, 300), st.integers(1, 9))
def test_moments_equal_numpys(seed: int, num_rows: int, dim: int) -> None:
    values_ND = rows(seed, num_rows, dim)
    sums = sums_of(values_ND)
    exact_ND = values_ND.astype(np.float64)
    np.testing.assert_allclose(sums.mean_D, exact_ND.mean(0), rtol=1e-11)
    found = decode_moments(encode_moments(sums, where="here"), where="here")
    expected_DD = np.cov(exact_ND, rowvar=False).reshape(dim, dim)
    # Of dimensions as different as 1e-6 and 1e5, each covariance is exact on the scale of its two dimensions. A
    # constant dimension of 50 has numpy's rounding of its mean, 1e-14, for a standard deviation.
    deviation_D = np.sqrt(np.diag(expected_DD)) + np.abs(exact_ND).max(0) * 1e-5
    error_DD = np.abs(found.covariance_DD - expected_DD) / (deviation_D[:, None] * deviation_D)
    assert error_DD.max() < 1e-9
    np.testing.assert_array_equal(found.covariance_DD, found.covariance_DD.T)


def test_products_of_a_whole_block_are_exact() -> None:
    # The largest integers of a split, all of one sign, in a full block: the largest sum that occurs.
    values_BD = np.full((BLOCK_ROWS, 2), 1 - 2.0**-20)
    values_BD[:, 1] = np.random.default_rng(0).integers(-(2**20), 2**20, BLOCK_ROWS) / 2**20
    found_DD = moments._exact_products(values_BD)
    for (i, j), found in np.ndenumerate(found_DD):
        exact = sum(Fraction(a) * Fraction(b) for a, b in zip(values_BD[:, i], values_BD[:, j], strict=True))
        assert found == float(exact)


def test_an_order_of_rows_that_changes_a_blas_product_changes_no_bit() -> None:
    values_ND = rows(0, 3000, 24)
    order_N = np.random.default_rng(1).permutation(len(values_ND))
    exact_ND = values_ND.astype(np.float64)
    plain = [(some_ND.T @ some_ND).tobytes() for some_ND in (exact_ND, exact_ND[order_N])]
    assert plain[0] != plain[1], "else this test shows nothing"
    assert same_bits(sums_of(values_ND), sums_of(values_ND[order_N]))


def test_blocks_of_a_view_are_merged() -> None:
    values_ND = rows(2, BLOCK_ROWS + 7, 3)
    assert [block.num_rows for block in moment_sums(values_ND, np.ones(len(values_ND), bool))] == [BLOCK_ROWS, 7]
    expected_DD = np.cov(values_ND.astype(np.float64), rowvar=False)
    scale_D = np.abs(values_ND).max(0).astype(np.float64)
    error_DD = np.abs(sums_of(values_ND).scatter_DD / (len(values_ND) - 1) - expected_DD) / (scale_D[:, None] * scale_D)
    assert error_DD.max() < 1e-12


@pytest.mark.parametrize("num_items", [1, 2, 3, 5])
def test_items_are_merged_alike_in_any_order_of_arrival(num_items: int) -> None:
    sums = [sums_of(rows(item, 5 + item, 3)) for item in range(num_items)]
    items: list[MomentSums | None] = [*sums]
    if num_items > 2:
        items[1] = None
    results: list[MomentSums | None] = []
    for order in itertools.permutations(range(num_items)):
        tree = MergeTree(num_items)
        for item in order:
            tree.add(item, items[item])
        results.append(tree.result())
    assert all(same_bits(result, results[0]) for result in results)
    assert results[0] is not None
    assert results[0].num_rows == sum(item.num_rows for item in items if item is not None)


def test_a_tree_in_order_holds_few_sums() -> None:
    tree, largest = MergeTree(64), 0
    for item in range(64):
        tree.add(item, sums_of(rows(item, 2, 2)))
        largest = max(largest, len(tree._waiting))
    assert largest <= 6


def test_no_rows_have_no_moments() -> None:
    tree = MergeTree(2)
    tree.add(1, None)
    tree.add(0, None)
    assert tree.result() is None
    assert MergeTree(0).result() is None


@pytest.mark.parametrize("num_rows", [0, 1])
def test_fewer_than_two_rows_have_no_covariance(num_rows: int) -> None:
    sums = sums_of(rows(0, 1, 3)) if num_rows else None
    with raises("cache.too-few-rows", CacheError, where="here"):
        encode_moments(sums, where="here")


def test_bytes_of_another_table_are_refused() -> None:
    with raises("cache.unreadable-parquet", CacheError):
        decode_moments(b"PAR1, but not really", where="here")
