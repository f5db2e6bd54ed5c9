"""Mean and covariance of the embeddings of a cache, with the same bits on any machine and for any number of tasks.

The products of a block of rows are added exactly: each number is split into two integers of 20 bits, whose products fit
into the 53 bits of a float64, so no order of a matrix product changes a bit. Blocks and shards are then merged in an
order that depends on the cache alone (Chan 1979).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.cache.format.files import read_parquet
from pipeline.core.errors import CacheError
from pipeline.core.hashing import digest

BLOCK_ROWS = 4096
"""2^12 products of two integers of up to 2^20 have a sum of at most 2^52."""
_BITS = 20


@dataclass(frozen=True, slots=True)
class MomentSums:
    """Of N ≥ 1 rows: their mean, and the sum of the products of their differences from it.

    Attributes:
        num_mixed: rows whose pixels are mixed with those of another image.
    """

    num_rows: int
    num_mixed: int
    mean_D: NDArray[np.float64]
    scatter_DD: NDArray[np.float64]


def moment_sums(values_ND: NDArray[np.float32], mixed_N: NDArray[np.bool_]) -> Iterator[MomentSums]:
    """The sums of each block of ``BLOCK_ROWS`` rows."""
    for start in range(0, len(values_ND), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        values_BD = values_ND[rows].astype(np.float64)
        mean_D = _exact_sum(values_BD) / len(values_BD)
        yield MomentSums(len(values_BD), int(mixed_N[rows].sum()), mean_D, _exact_products(values_BD - mean_D))


def merge(first: MomentSums, second: MomentSums) -> MomentSums:
    """The sums of the rows of both."""
    num_rows = first.num_rows + second.num_rows
    difference_D = second.mean_D - first.mean_D
    between_DD = difference_D[:, None] * difference_D * (first.num_rows * second.num_rows / num_rows)
    return MomentSums(
        num_rows,
        first.num_mixed + second.num_mixed,
        first.mean_D + difference_D * (second.num_rows / num_rows),
        first.scatter_DD + second.scatter_DD + between_DD,
    )


def _split(values_BD: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int32]]:
    """Integers (high, low) and exponents of columns: a value is ``(high + low / 2^20) · 2^exponent``, rounded to 2^-41
    of the power of two above the largest magnitude of its column."""
    exponent_D = np.frexp(np.abs(values_BD).max(0))[1] - _BITS
    scaled_BD = np.ldexp(values_BD, -exponent_D)
    high_BD = np.rint(scaled_BD)
    return high_BD, np.rint(np.ldexp(scaled_BD - high_BD, _BITS)), exponent_D


def _exact_sum(values_BD: NDArray[np.float64]) -> NDArray[np.float64]:
    high_BD, low_BD, exponent_D = _split(values_BD)
    return np.ldexp(high_BD.sum(0) + np.ldexp(low_BD.sum(0), -_BITS), exponent_D)


def _exact_products(values_BD: NDArray[np.float64]) -> NDArray[np.float64]:
    """``valuesᵀ · values``: every sum below is one of integers, and exact."""
    high_BD, low_BD, exponent_D = _split(values_BD)
    cross_DD = high_BD.T @ low_BD
    sums_DD = high_BD.T @ high_BD + np.ldexp(cross_DD + cross_DD.T, -_BITS) + np.ldexp(low_BD.T @ low_BD, -2 * _BITS)
    return np.ldexp(sums_DD, exponent_D[:, None] + exponent_D)


class MergeTree:
    """Merges the sums of items 0 to n − 1 by a binary tree over their numbers, in whatever order they arrive. Holds
    about as many sums as are late, not n."""

    def __init__(self, num_items: int) -> None:
        self._num_items = num_items
        self._waiting: dict[tuple[int, int], MomentSums | None] = {}

    def add(self, number: int, sums: MomentSums | None) -> None:
        """The sums of an item; None: it has no rows."""
        level, size = 0, self._num_items
        while size > 1:
            sibling = number ^ 1
            if sibling < size:
                if (level, sibling) not in self._waiting:
                    self._waiting[level, number] = sums
                    return
                other = self._waiting.pop((level, sibling))
                sums = _merged(other, sums) if sibling < number else _merged(sums, other)
            level, number, size = level + 1, number // 2, (size + 1) // 2
        self._waiting[level, number] = sums

    def result(self) -> MomentSums | None:
        """The sums of all items, after the last was added; None: there are no rows."""
        (sums,) = self._waiting.values() if self._num_items else (None,)
        return sums


def _merged(first: MomentSums | None, second: MomentSums | None) -> MomentSums | None:
    return merge(first, second) if first is not None and second is not None else first or second


@dataclass(frozen=True, slots=True)
class EmbeddingMoments:
    """Mean [D] and covariance [D,D] (divisor N − 1) of N embeddings, and the SHA-256 of their file."""

    mean_D: NDArray[np.float64]
    covariance_DD: NDArray[np.float64]
    sha256: str


def encode_moments(sums: MomentSums | None, *, where: str) -> bytes:
    """A Parquet file of ``moments/``: for each dimension its mean, and its covariance with each dimension.

    Raises:
        CacheError: there are fewer than two rows.
    """
    if sums is None or sums.num_rows < 2:
        raise CacheError(
            "too few rows for a covariance",
            code="cache.too-few-rows",
            where=where,
            got="no row" if sums is None else "1 row",
            expected="at least 2",
            next_step="build a cache of more images",
        )
    covariance_DD = sums.scatter_DD / (sums.num_rows - 1)
    packed = pa.FixedSizeListArray.from_arrays(pa.array(covariance_DD.ravel()), len(covariance_DD))
    sink = io.BytesIO()
    pq.write_table(
        pa.table({"mean": sums.mean_D, "covariance": packed}), sink, compression="zstd", use_dictionary=False
    )
    return sink.getvalue()


def decode_moments(data: bytes, *, where: str) -> EmbeddingMoments:
    """
    Raises:
        CacheError: this is not such a file.
    """
    table = read_parquet(data, where=where)
    try:
        mean_D = table["mean"].to_numpy()
        covariance_DD = table["covariance"].combine_chunks().flatten().to_numpy().reshape(len(mean_D), len(mean_D))
    # Other columns or types.
    except (AttributeError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise CacheError(
            "this is not a file of moments", code="cache.invalid-moments", where=where, got=str(error)
        ) from error
    return EmbeddingMoments(mean_D, covariance_DD, digest(data))
