"""``sampled:n@T``: the largest probabilities of a row at one temperature, and samples of the others.

Losses that are linear in the teacher's probabilities, such as ``kd``, have the gradient of the exact probabilities on
average if the stored ones have them as their mean. Cutting the small ones off, as ``topk`` does, has an error that no
number of views removes. Here each of m samples of the others weighs R / m, with R their total probability, and the
samples are systematic: at equal distances along the cumulative probabilities, in the order of the classes, from a
random start. The start of a row is a function of its sample id, and its views divide the distance between two samples
evenly: view v adds the bit-reversed v (van der Corput), which does so for any number of views, also when a cache gets
more of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from math import prod
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.augment.random_bits import key_of
from pipeline.cache.format.codec.encoding import Encoding, RowIdentity, Rows, check_num_classes, largest
from pipeline.core.errors import CacheError
from schemas.cache_format import Output, RowField

NAME = "sampled"

_CODE_BITS = 12
_MAX_CODE = (1 << _CODE_BITS) - 1
_STEP = np.log1p(32 / 3) / _MAX_CODE
"""Of the codes of exact classes, which reach to 32 nats below the largest."""
_ODDS_PER_NAT, _MAX_ODDS = 1024, (1 << 15) - 1
_ABSENT = -1000.0
"""Nats: its exponential is zero, in float64 too, and it stays finite times any temperature."""
_VIEW_BITS = 16
_NUMBERS_AT_ONCE = 1 << 22

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
_Number = TypeVar("_Number", int, Ints)
_Entries = tuple[Ints, Ints, Floats]
"""Rows, classes, and the logarithms of their probabilities."""


def starts(identity: RowIdentity) -> Floats:
    """[N] in [0, 1): where the samples of a row start, in units of the distance between two.

    Multiples of 2^-32, so that m minus one of them is exact.
    """
    keys_N = np.array([key_of("sampled", sample_id)[0] for sample_id in identity.sample_ids], np.uint64)
    view_N = np.broadcast_to(np.asarray(identity.view, np.uint64), len(keys_N))
    # Sums of uint64 wrap around.
    return ((keys_N + _reversed(view_N)) >> np.uint64(32)).astype(np.float64) * 2.0**-32


def _reversed(view_N: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The bits of view numbers in reverse, as the upper bits of 64."""
    bits_NV = view_N[:, None] >> np.arange(_VIEW_BITS, dtype=np.uint64) & np.uint64(1)
    return (bits_NV << np.arange(63, 63 - _VIEW_BITS, -1, dtype=np.uint64)).sum(1, dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class Layout:
    """The field ``bits`` of a row with e exact classes and m samples. The first bit of a byte is its lowest.

    Exact classes stand at the front: the id of the largest, then code and id of each other one. The ids of the samples
    ascend and are in Elias-Fano coding: their lower bits stand at the back, the first sample last; between these two,
    bit ``(id >> low_bits) + j`` is set for sample j.
    """

    num_classes: int
    num_bits: int

    @property
    def id_bits(self) -> int:
        return (self.num_classes - 1).bit_length()

    @property
    def entry_bits(self) -> int:
        """Of an exact class. The first one needs no code."""
        return _CODE_BITS + self.id_bits

    @property
    def low_bits(self) -> int:
        """Close to the best number where a row has a sample for each ten bits, which is usual."""
        return max(0, (10 * self.num_classes // self.num_bits).bit_length() - 1)

    @property
    def sample_bits(self) -> int:
        """By which a further sample lengthens a row."""
        return self.low_bits + 1

    def front_bits(self, num_exact: _Number) -> _Number:
        return num_exact * self.entry_bits - _CODE_BITS

    def num_samples(self, num_exact: _Number) -> _Number:
        """m, of a row with so many exact classes: as many as fit."""
        high_bits = (self.num_classes - 1) >> self.low_bits
        return (self.num_bits - high_bits - self.front_bits(num_exact)) // self.sample_bits

    @property
    def max_exact(self) -> int:
        """The largest e that leaves room for a sample, and a class to sample."""
        high_bits = (self.num_classes - 1) >> self.low_bits
        room = self.num_bits - high_bits - self.sample_bits + _CODE_BITS
        return min(room // self.entry_bits, self.num_classes - 1)


@lru_cache(maxsize=64)
def _num_bytes(num_classes: int, n: int) -> int:
    """The smallest number in which each row has n classes or samples. It has fewest if n - 1 of them are exact."""
    return next(size for size in count(1) if Layout(num_classes, 8 * size).num_samples(max(n - 1, 1)) >= 1)


def sampled_temperature(kind: str) -> float | None:
    """T of ``cache.logits``, if that is ``sampled:n@T``."""
    return float(kind.partition("@")[2]) if kind.startswith(NAME) else None


def _describe(name: str, shape: tuple[int, ...], kind: str) -> Output:
    width = prod(shape)
    n, temperature = int(kind.removeprefix(f"{NAME}:").partition("@")[0]), sampled_temperature(kind)
    assert temperature is not None
    check_num_classes(kind, width, minimum=n + 1, next_step="choose a smaller n, or cache.logits=int8")
    layout = Layout(width, 8 * _num_bytes(width, n))
    fields = (
        RowField(name="num_exact", dtype="|u1" if layout.max_exact < 1 << 8 else "<u2", count=1),
        RowField(name="odds", dtype="<i2", count=1),
        RowField(name="bits", dtype="|u1", count=layout.num_bits // 8),
    )
    return Output(name=name, shape=shape, dtype="uint8", encoding=NAME, fields=fields, temperatures=(temperature,))


def _layout(output: Output) -> Layout:
    return Layout(prod(output.shape), 8 * output.fields[-1].count)


def _pack(values_NK: NDArray[np.float32], rows_N: Rows, output: Output, identity: RowIdentity | None) -> None:
    assert identity is not None, "where samples start depends on the identity of a row"
    start_N, layout, temperature = starts(identity), _layout(output), output.temperatures[0]
    step = max(1, _NUMBERS_AT_ONCE // layout.num_classes)
    for first in range(0, len(rows_N), step):
        chunk = slice(first, first + step)
        chunk_NK = values_NK[chunk]
        if not np.isfinite(chunk_NK).all():
            # These rows are refused afterwards.
            chunk_NK = np.nan_to_num(chunk_NK, nan=0, posinf=0, neginf=0)
        _pack_finite(chunk_NK, rows_N[chunk], layout, temperature, start_N[chunk])


def _pack_finite(
    values_NK: NDArray[np.float32], rows_N: Rows, layout: Layout, temperature: float, start_N: Floats
) -> None:
    nats_NK = values_NK.astype(np.float64) / temperature
    nats_NK -= nats_NK.max(axis=1, keepdims=True)
    p_NK = np.exp(nats_NK)
    p_NK /= p_NK.sum(axis=1, keepdims=True)
    ids_NE = largest(values_NK, layout.max_exact)
    p_NE = np.take_along_axis(p_NK, ids_NE, axis=1)
    num_exact_N = _num_exact(p_NE, layout)
    is_exact_NE = np.arange(layout.max_exact) < num_exact_N[:, None]
    codes_NE = _codes(-np.take_along_axis(nats_NK, ids_NE, axis=1))
    row_M, position_M = np.nonzero(is_exact_NE)
    p_NK[row_M, ids_NE[row_M, position_M]] = 0
    rest_N = p_NK.sum(axis=1)
    # The others of a class that has all probability: any of them, with next to none.
    for row in np.flatnonzero(rest_N == 0):
        p_NK[row] = 1
        p_NK[row, ids_NE[row, : num_exact_N[row]]] = 0
    with np.errstate(divide="ignore"):
        odds_N = np.rint(_ODDS_PER_NAT * (np.log(rest_N) - np.log((p_NE * is_exact_NE).sum(axis=1))))
    rows_N["num_exact"][:, 0] = num_exact_N
    rows_N["odds"][:, 0] = np.clip(odds_N, -_MAX_ODDS, _MAX_ODDS)
    bits_NB = np.zeros((len(rows_N), layout.num_bits), np.uint8)
    front_NEB = np.zeros((len(rows_N), layout.max_exact, layout.entry_bits), np.uint8)
    front_NEB[:, :, : layout.id_bits] = _to_bits(ids_NE * is_exact_NE, layout.id_bits)
    front_NEB[:, :-1, layout.id_bits :] = _to_bits((codes_NE * is_exact_NE)[:, 1:], _CODE_BITS)
    bits_NB[:, : layout.front_bits(layout.max_exact)] = front_NEB.reshape(len(rows_N), -1)[:, :-_CODE_BITS]
    num_samples_N = layout.num_samples(num_exact_N)
    row_M, id_M = _samples(p_NK, num_samples_N, start_N)
    rank_M = _ranks(num_samples_N)
    bits_NB[row_M, layout.front_bits(num_exact_N)[row_M] + (id_M >> layout.low_bits) + rank_M] = 1
    for bit in range(layout.low_bits):
        bits_NB[row_M, layout.num_bits - (rank_M + 1) * layout.low_bits + bit] = id_M >> bit & 1
    rows_N["bits"] = np.packbits(bits_NB, axis=1, bitorder="little")


def _num_exact(p_NE: Floats, layout: Layout) -> Ints:
    """[N]: the smallest number after which the samples of the next class take no more bits than an exact class.

    Args:
        p_NE: the largest probabilities, in descending order.
    """
    rest_NE = 1 - np.cumsum(p_NE[:, :-1], axis=1)
    sample_bits_E = layout.num_samples(np.arange(1, layout.max_exact)) * layout.sample_bits
    is_long_NE = p_NE[:, 1:] * sample_bits_E > layout.entry_bits * rest_NE
    return 1 + np.logical_and.accumulate(is_long_NE, axis=1).sum(axis=1, dtype=np.int64)


def _codes(below_NE: Floats) -> Ints:
    """Of distances below the largest, in nats. Only classes with the largest probability share its code 0."""
    codes_NE = np.rint(np.log1p(below_NE / 3) / _STEP)
    return np.clip(codes_NE, below_NE > 0, _MAX_CODE).astype(np.int64)


def _samples(p_NK: Floats, num_samples_N: Ints, start_N: Floats) -> tuple[Ints, Ints]:
    """Rows and classes of all samples, in this order."""
    sums_NK = np.cumsum(p_NK, axis=1)
    # In units of the distance between two samples, which are at start, start + 1, …. The last sum is exactly m.
    sums_NK /= sums_NK[:, -1:].copy()
    sums_NK *= num_samples_N[:, None]
    sums_NK -= start_N[:, None]
    before_NK = np.ceil(sums_NK, out=sums_NK)
    num_NK = before_NK.copy()
    num_NK[:, 1:] -= before_NK[:, :-1]
    at_M = np.flatnonzero(num_NK)
    num_M = num_NK.ravel()[at_M].astype(np.int64)
    row_M, id_M = np.divmod(np.repeat(at_M, num_M), num_NK.shape[1])
    return row_M, id_M


def _ranks(num_N: Ints) -> Ints:
    """0, 1, … for the samples of each row."""
    return np.arange(num_N.sum()) - np.repeat(np.cumsum(num_N) - num_N, num_N)


def _to_bits(numbers_NE: Ints, num_bits: int) -> NDArray[np.uint8]:
    """[N,E,num_bits], the lowest bit first."""
    return (numbers_NE[:, :, None] >> np.arange(num_bits) & 1).astype(np.uint8)


def _from_bits(bits: NDArray[np.uint8]) -> Ints:
    """The inverse of ``_to_bits``, of bits along the last axis."""
    # Exact, and by BLAS, which has no product of integers.
    return (bits.astype(np.float64) @ 2.0 ** np.arange(bits.shape[-1])).astype(np.int64)


def _unpack(rows_N: Rows, output: Output, temperature: float) -> NDArray[np.float32]:
    layout, num_exact_N = _layout(output), rows_N["num_exact"][:, 0].astype(np.int64)
    odds_N = rows_N["odds"][:, 0] / _ODDS_PER_NAT
    if not ((num_exact_N >= 1) & (num_exact_N <= layout.max_exact)).all():
        raise _invalid(output)
    bits_NB = np.unpackbits(rows_N["bits"], axis=1, bitorder="little")
    values_NK = np.full((len(rows_N), layout.num_classes), _ABSENT * temperature, np.float32)
    # log R = -log(1 + exp(-odds)), and log(1 - R) likewise.
    row_M, id_M, nats_M = _read_exact(bits_NB, layout, num_exact_N, -np.logaddexp(0, odds_N))
    values_NK[row_M, id_M] = temperature * nats_M
    row_M, id_M, nats_M = _read_samples(bits_NB, layout, num_exact_N, -np.logaddexp(0, -odds_N), output)
    if len(row_M) and not (0 <= id_M.min() <= id_M.max() < layout.num_classes):
        raise _invalid(output)
    values_NK[row_M, id_M] = temperature * nats_M
    return values_NK


def _read_exact(bits_NB: NDArray[np.uint8], layout: Layout, num_exact_N: Ints, total_N: Floats) -> _Entries:
    """
    Args:
        total_N: log of the probability of all exact classes.
    """
    width = int(num_exact_N.max(initial=1))
    front_NB = np.pad(bits_NB, ((0, 0), (0, _CODE_BITS)))[:, : width * layout.entry_bits]
    front_NEB = front_NB.reshape(len(bits_NB), width, layout.entry_bits)
    ids_NE, codes_NE = _from_bits(front_NEB[:, :, : layout.id_bits]), _from_bits(front_NEB[:, :-1, layout.id_bits :])
    nats_NE = np.zeros((len(bits_NB), width))
    nats_NE[:, 1:] = -3 * np.expm1(_STEP * codes_NE)
    is_exact_NE = np.arange(width) < num_exact_N[:, None]
    nats_NE += (total_N - np.log((np.exp(nats_NE) * is_exact_NE).sum(axis=1)))[:, None]
    return np.nonzero(is_exact_NE)[0], ids_NE[is_exact_NE], nats_NE[is_exact_NE]


def _read_samples(
    bits_NB: NDArray[np.uint8], layout: Layout, num_exact_N: Ints, total_N: Floats, output: Output
) -> _Entries:
    """
    Args:
        total_N: log of the probability of all other classes.
    """
    num_samples_N = layout.num_samples(num_exact_N)
    position_B, low_bits = np.arange(layout.num_bits), layout.low_bits
    front_N, back_N = layout.front_bits(num_exact_N), layout.num_bits - num_samples_N * low_bits
    is_high_NB = (position_B >= front_N[:, None]) & (position_B < back_N[:, None]) & (bits_NB == 1)
    if (is_high_NB.sum(axis=1) != num_samples_N).any():
        raise _invalid(output)
    row_M, position_M = np.divmod(np.flatnonzero(is_high_NB), layout.num_bits)
    rank_M = _ranks(num_samples_N)
    id_M = position_M - front_N[row_M] - rank_M
    for bit in reversed(range(low_bits)):
        id_M = id_M << 1 | bits_NB[row_M, layout.num_bits - (rank_M + 1) * low_bits + bit]
    # A class may have several samples, which are neighbours.
    starts = np.flatnonzero(np.diff(row_M * layout.num_classes + id_M, prepend=-1))
    num_L = np.diff(starts, append=len(id_M))
    row_L = row_M[starts]
    return row_L, id_M[starts], np.log(num_L) + (total_N - np.log(num_samples_N))[row_L]


def _invalid(output: Output) -> CacheError:
    return CacheError(
        "the bits of these rows are not those of exact classes and samples",
        code="cache.invalid-samples",
        where=f"column {output.name}",
        next_step="run: stillroom cache verify CACHE",
    )


SAMPLED = Encoding(NAME, (NAME,), _describe, _pack, _unpack)
