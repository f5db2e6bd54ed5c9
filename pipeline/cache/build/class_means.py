"""Sums of embeddings by class, and the class means that ND uses (Wang 2023, 2305.17007).

Sums are int64 fixed point with 24 fractional bits. Integer addition is associative, so any order, retry or later
addition of parts gives the same bits, and a digest can compare the means. Float addition is not associative.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage
from pipeline.cache.format.codec import column_of
from pipeline.cache.format.files import REBUILD, read_parquet
from pipeline.core.errors import CacheError

FRACTION_BITS = 24


@dataclass(frozen=True, slots=True)
class ClassSums:
    """Sums over the rows of the C classes that occur, in ascending order of the classes."""

    class_C: NDArray[np.int32]
    count_C: NDArray[np.int64]
    sum_CD: NDArray[np.int64]


def sum_rows(embedding_ND: NDArray[np.float32], class_N: NDArray[np.int32]) -> ClassSums:
    """Class sums of N rows, each of which has a class.

    Raises:
        CacheError: the embeddings are so large that the fixed point would overflow.
    """
    scaled_ND = np.rint(np.ldexp(embedding_ND.astype(np.float64), FRACTION_BITS))
    # The sum of magnitudes bounds every class sum and its partial sums.
    _check_range(np.abs(scaled_ND).sum(0))
    classes, inverse, counts = np.unique(class_N, return_inverse=True, return_counts=True)
    sum_CD = np.zeros((len(classes), embedding_ND.shape[1]), np.int64)
    np.add.at(sum_CD, inverse, scaled_ND.astype(np.int64))
    return ClassSums(classes.astype(np.int32), counts.astype(np.int64), sum_CD)


def merge(sums: Sequence[ClassSums]) -> ClassSums:
    """The class sums of all rows together. Associative and commutative, with equal bits."""
    classes, inverse = np.unique(np.concatenate([part.class_C for part in sums]), return_inverse=True)
    count_C = np.zeros(len(classes), np.int64)
    np.add.at(count_C, inverse, np.concatenate([part.count_C for part in sums]))
    sum_CD = np.zeros((len(classes), sums[0].sum_CD.shape[1]), np.int64)
    start = 0
    for part in sums:
        rows = inverse[start : start + len(part.class_C)]
        # Each part is below half the range, so a float copy of the total shows whether the integers would overflow.
        _check_range(sum_CD[rows].astype(np.float64) + part.sum_CD.astype(np.float64))
        sum_CD[rows] += part.sum_CD
        start += len(part.class_C)
    return ClassSums(classes.astype(np.int32), count_C, sum_CD)


def add_up(sums: Iterable[ClassSums]) -> ClassSums:
    """``merge`` of one or more sums, in the memory of two."""
    return reduce(lambda total, part: merge([total, part]), sums)


def _check_range(scaled: NDArray[np.float64]) -> None:
    if scaled.size and not (np.abs(scaled) < 2.0**62).all():
        raise CacheError(
            "embeddings are too large for exact class sums",
            code="cache.class-sums-overflow",
            got=f"a sum of magnitude {float(np.abs(scaled).max()) / 2**FRACTION_BITS:.4g}",
            expected=f"below {2.0 ** (62 - FRACTION_BITS):.4g}",
            next_step="set cache.class_means=none",
        )


def encode_sums(sums: ClassSums) -> bytes:
    """A file of ``means/``."""
    packed = column_of(np.ascontiguousarray(sums.sum_CD).view(np.uint8))
    table = pa.table({"class": sums.class_C, "count": sums.count_C, "sum": packed})
    return _parquet(table.replace_schema_metadata({"stillroom:embedding_dim": str(sums.sum_CD.shape[1])}))


def decode_sums(data: bytes, *, where: str) -> ClassSums:
    table = read_parquet(data, where=where)
    dim = int(table.schema.metadata[b"stillroom:embedding_dim"])
    packed = b"".join(table["sum"].to_pylist())
    sum_CD = np.frombuffer(packed, np.int64).reshape(len(table), dim)
    return ClassSums(table["class"].to_numpy(), table["count"].to_numpy(), sum_CD)


def encode_means(sums: ClassSums, *, fingerprint: str) -> bytes:
    """``class_means.parquet``: class, count, mean (fp32), norm. Its metadata has the teacher's fingerprint, because
    another teacher's means of the same width would otherwise load silently."""
    mean_CD = np.ldexp(sums.sum_CD.astype(np.float64), -FRACTION_BITS) / sums.count_C[:, None]
    return _encode(sums.class_C, pa.array(sums.count_C), mean_CD, {"stillroom:fingerprint": fingerprint})


def encode_imported(
    class_C: NDArray[np.int32], mean_CD: NDArray[np.float32], *, fingerprint: str, sha256: str
) -> bytes:
    """``class_means.parquet`` from a file with this SHA-256. Counts are null, because the file does not have them."""
    metadata = {"stillroom:fingerprint": fingerprint, "stillroom:imported": sha256}
    return _encode(class_C, pa.nulls(len(class_C), pa.int64()), mean_CD.astype(np.float64), metadata)


def _encode(
    class_C: NDArray[np.int32], count_C: pa.Array, mean_CD: NDArray[np.float64], metadata: dict[str, str]
) -> bytes:
    flat = pa.array(mean_CD.astype(np.float32).ravel())
    table = pa.table(
        {
            "class": class_C,
            "count": count_C,
            "mean": pa.FixedSizeListArray.from_arrays(flat, mean_CD.shape[1]),
            "norm": np.linalg.norm(mean_CD, axis=1).astype(np.float32),
        }
    )
    return _parquet(table.replace_schema_metadata(metadata))


@dataclass(frozen=True, slots=True)
class ClassMeans:
    """[K,D] means, with NaN for classes without a mean, and their [K] row counts; None for imported means."""

    mean_KD: NDArray[np.float32]
    count_K: NDArray[np.int64] | None


def decode_means(data: bytes, *, num_classes: int, fingerprint: str, where: str) -> ClassMeans:
    """
    Raises:
        CacheError: the means are another teacher's, or do not fit ``num_classes``.
    """
    table = read_parquet(data, where=where)
    written_by = (table.schema.metadata or {}).get(b"stillroom:fingerprint", b"").decode()
    if written_by != fingerprint:
        raise CacheError(
            "these class means belong to another teacher",
            code="cache.class-means-of-another-teacher",
            where=where,
            got=written_by or "no fingerprint",
            expected=fingerprint,
            next_step=REBUILD,
        )
    classes = table["class"].to_numpy()
    dim = table.schema.field("mean").type.list_size
    has_other_classes = ((classes < 0) | (classes >= num_classes)).any()
    if has_other_classes or num_classes * dim * 4 > storage.MAX_TABLE_BYTES:
        raise CacheError(
            "these class means do not fit the number of classes",
            code="cache.invalid-class-means",
            where=where,
            got=f"{len(classes)} means of {dim} numbers",
            expected=f"classes in 0..{num_classes - 1}, and at most {storage.MAX_TABLE_BYTES} bytes for all",
            next_step=REBUILD,
        )
    mean_CD = table["mean"].combine_chunks().flatten().to_numpy().reshape(len(classes), dim)
    mean_KD = np.full((num_classes, mean_CD.shape[1]), np.nan, np.float32)
    mean_KD[classes] = mean_CD
    if table["count"].null_count:
        return ClassMeans(mean_KD, None)
    count_K = np.zeros(num_classes, np.int64)
    count_K[classes] = table["count"].to_numpy()
    return ClassMeans(mean_KD, count_K)


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False)
    return sink.getvalue()
