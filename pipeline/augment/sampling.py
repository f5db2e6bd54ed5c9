"""Uniform samples by counter, and the maps from them to parameters.

Every map uses only float64 +, ×, ÷, √, floor and rint, each of which IEEE 754 rounds exactly, so results are the same
bits on every platform. The exponential is implemented here for the same reason: versions of libm and SIMD libraries
differ in the last bit.
"""

from __future__ import annotations

from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from pipeline.augment.random_bits import RandomBits, philox4x64, to_uniform

# The third counter word separates the streams, so that a new augmentation changes no sample of the existing ones.
STREAM_BOX, STREAM_FLIP_AND_MIX, STREAM_CANARY = 0, 1, 2
STREAM_JITTER, STREAM_OPS, STREAM_ERASING, STREAM_CUTMIX = 3, 4, 5, 6

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


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
