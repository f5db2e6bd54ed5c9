"""Counter-based random bits, permutations and uniform samples.

The generator is Philox4x64-10 (Salmon 2011, "Parallel random numbers: as easy as 1, 2, 3"). A block of bits is a
function of (key, counter) alone, so any row of any view can be sampled without those before it. Maps from bits to
numbers are part of this module, because libraries keep their bit streams stable but not their distributions. They use
only float64 +, ×, ÷, √, floor and rint, each of which IEEE 754 rounds exactly, so results are the same bits on every
platform. The exponential is implemented here for the same reason: versions of libm and SIMD libraries differ in the
last bit.

Everything here is part of the format: a change of any output needs a new ``RNG_VERSION``, which is part of every views
id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

RNG_VERSION = 1

RandomBits = NDArray[np.uint64]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# The third counter word separates the streams, so that a new augmentation changes no sample of the existing ones.
STREAM_BOX, STREAM_FLIP_AND_MIX, STREAM_CANARY = 0, 1, 2
STREAM_JITTER, STREAM_OPS, STREAM_ERASING, STREAM_CUTMIX = 3, 4, 5, 6
STREAM_SCALE = 7

_ROUNDS = 10
_BLOCKS_AT_ONCE = 1 << 12
_MULTIPLIERS_21 = np.array([[0xD2E7470EE14C6C93], [0xCA5A826395121157]], dtype=np.uint64)
_KEY_STEPS_21 = np.array([[0x9E3779B97F4A7C15], [0xBB67AE8584CAA73B]], dtype=np.uint64)
_LOW_HALF = np.uint64(0xFFFFFFFF)
_HALF_BITS = np.uint64(32)
_MULTIPLIERS_HIGH_21 = _MULTIPLIERS_21 >> _HALF_BITS
_MULTIPLIERS_LOW_21 = _MULTIPLIERS_21 & _LOW_HALF


def philox4x64(keys_N2: RandomBits, counters_N4: RandomBits) -> RandomBits:
    """Ten rounds of Philox4x64, in the word order of Random123.

    Args:
        keys_N2: uint64 keys, or [1, 2] for one key for all counters.
        counters_N4: uint64 counters, the least significant word first.

    Returns:
        uint64 [N, 4].
    """
    even_2N, odd_2N = counters_N4.T[0::2], counters_N4.T[1::2]
    keys_2N = keys_N2.T
    for number in range(_ROUNDS):
        if number:
            keys_2N = keys_2N + _KEY_STEPS_21
        even_2N, odd_2N = (_high_product(even_2N)[::-1] ^ odd_2N ^ keys_2N), (even_2N * _MULTIPLIERS_21)[::-1]
    random_bits_4N = np.stack([even_2N[0], odd_2N[0], even_2N[1], odd_2N[1]])
    return np.ascontiguousarray(random_bits_4N.T)


def _high_product(random_bits_2N: RandomBits) -> RandomBits:
    """Upper 64 bits of the 128-bit products with the multipliers of a round; NumPy's integers end at 64 bits."""
    high, low = random_bits_2N >> _HALF_BITS, random_bits_2N & _LOW_HALF
    low_low = low * _MULTIPLIERS_LOW_21
    high_low = high * _MULTIPLIERS_LOW_21
    # At most (2^32 - 1)^2 + 2 (2^32 - 1) = 2^64 - 1, so neither sum can wrap.
    middle = (low_low >> _HALF_BITS) + (high_low & _LOW_HALF) + low * _MULTIPLIERS_HIGH_21
    return high * _MULTIPLIERS_HIGH_21 + (high_low >> _HALF_BITS) + (middle >> _HALF_BITS)


def key_of(*parts: str | int) -> RandomBits:
    """The key of these arguments: uint64 [2].

    The hash input is the concatenation of the parts. An integer contributes ``i`` and 8 bytes, signed, little-endian;
    a string contributes ``s``, its length in bytes as 8 bytes, unsigned, little-endian, and its UTF-8 (a lone
    surrogate, as in undecodable file names, is three bytes). Different arguments have different hash inputs. The key
    is the first 16 bytes of the BLAKE2b-512, read as two little-endian integers.

    Raises:
        OverflowError: an integer outside [-2^63, 2^63).
    """
    canonical = b"".join(_canonical(part) for part in parts)
    return np.frombuffer(hashlib.blake2b(canonical).digest()[:16], dtype="<u8").astype(np.uint64)


def _canonical(part: str | int) -> bytes:
    if isinstance(part, int):
        return b"i" + part.to_bytes(8, "little", signed=True)
    data = part.encode("utf-8", "surrogatepass")
    return b"s" + len(data).to_bytes(8, "little") + data


def to_uniform(random_bits: RandomBits) -> Floats:
    """uint64 to float64 in [0, 1), exactly ``(bits >> 11) * 2**-53``; same shape."""
    return np.asarray((random_bits >> np.uint64(11)) * 2.0**-53, dtype=np.float64)


def permutation(key_2: RandomBits, size: int) -> Ints:
    """The permutation of ``range(size)`` that sorts the key's first uint64s; the sort is stable. int64 [size]."""
    return next(permutations(key_2[None], [size]))


def permutations(keys_N2: RandomBits, sizes: Sequence[int]) -> Iterator[Ints]:
    """``permutation`` of each key. Bits of short permutations are generated together, which is faster."""
    ends_N = np.cumsum([-(-size // 4) for size in sizes])
    first = 0
    while first < len(sizes):
        begin = ends_N[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends_N, begin + _BLOCKS_AT_ONCE)))
        yield from _permutations_of_batch(keys_N2[first:last], sizes[first:last])
        first = last


def _permutations_of_batch(keys_N2: RandomBits, sizes: Sequence[int]) -> Iterator[Ints]:
    blocks_N = np.array([-(-size // 4) for size in sizes])
    begin_N = np.cumsum(blocks_N) - blocks_N
    counters_B4 = np.zeros((blocks_N.sum(), 4), dtype=np.uint64)
    counters_B4[:, 0] = np.arange(len(counters_B4)) - np.repeat(begin_N, blocks_N)
    random_bits = philox4x64(np.repeat(keys_N2, blocks_N, axis=0), counters_B4).reshape(-1)
    for start, size in zip((4 * begin_N).tolist(), sizes, strict=True):
        yield np.argsort(random_bits[start : start + size], kind="stable")


def sample_uniforms(keys_N2: RandomBits, views_N: Ints, stream: int, block: int = 0) -> Floats:
    """Four uniform samples in [0, 1) for each row: float64 [N, 4]."""
    counters_N4 = np.zeros((len(keys_N2), 4), dtype=np.uint64)
    counters_N4[:, 0] = block
    counters_N4[:, 1] = views_N
    counters_N4[:, 2] = stream
    return to_uniform(philox4x64(keys_N2, counters_N4))


def uniform_between(low: float | Floats, high: float | Floats, uniform_N: Floats) -> Floats:
    """Maps uniform samples in [0, 1) to [low, high)."""
    return low + (high - low) * uniform_N


def log_uniform_between(bounds: tuple[float, float], uniform_N: Floats) -> Floats:
    """Maps uniform samples in [0, 1) to log-uniform ones between the bounds, 0 < low <= high."""
    low, high = bounds
    # Decimal rounds its logarithm correctly in software, on every platform.
    return low * _exp(float((Decimal(high) / Decimal(low)).ln()) * uniform_N)


def _exp(x_N: Floats) -> Floats:
    """e^x for x >= 0, from exactly rounded operations only; relative error about (2 + x) · 1e-16."""
    ln2 = 0.6931471805599453
    power_N = np.rint(x_N / ln2)
    rest_N = x_N - power_N * ln2
    sum_N = np.ones_like(x_N)
    for degree in range(14, 0, -1):
        sum_N = 1 + sum_N * rest_N / degree
    return np.ldexp(sum_N, power_N.astype(np.int32))
