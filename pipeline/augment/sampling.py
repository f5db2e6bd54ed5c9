"""Numbers of a row from its words: uniforms by counter, and the maps that turn them into parameters.

Every map is made of float64 +, ×, ÷, √, floor and rint alone, each of which IEEE 754 rounds exactly, so results are the
same bits on every platform; the exponential is our own for that reason, since libm and SIMD versions differ in the last
bit.
"""

from __future__ import annotations

from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from pipeline.augment.random_bits import RandomBits, philox4x64, to_uniform

# The third counter word keeps draws apart, so that a further augmentation moves none of the present ones.
STREAM_BOX, STREAM_FLIP_AND_MIX, STREAM_CANARY = 0, 1, 2
STREAM_JITTER, STREAM_OPS, STREAM_ERASING, STREAM_CUTMIX = 3, 4, 5, 6

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def sample_uniforms(keys_N2: RandomBits, views_N: Ints, stream: int, block: int = 0) -> Floats:
    """Four uniforms in [0, 1) a row: float64 [N, 4]."""
    counters_N4 = np.zeros((len(keys_N2), 4), dtype=np.uint64)
    counters_N4[:, 0] = block
    counters_N4[:, 1] = views_N
    counters_N4[:, 2] = stream
    return to_uniform(philox4x64(keys_N2, counters_N4))


def uniform_between(low: float | Floats, high: float | Floats, uniform_N: Floats) -> Floats:
    """Uniforms stretched to [low, high]."""
    return low + (high - low) * uniform_N


def log_uniform_between(bounds: tuple[float, float], uniform_N: Floats) -> Floats:
    """Uniforms to numbers whose logarithm is uniform between those of the bounds, 0 < low <= high."""
    low, high = bounds
    # Decimal's logarithm is correctly rounded in software: the same on every platform.
    return low * _exp(float((Decimal(high) / Decimal(low)).ln()) * uniform_N)


def _exp(x_N: Floats) -> Floats:
    """e^x for x >= 0 from exactly rounded operations only; relative error about (2 + x) · 1e-16."""
    ln2 = 0.6931471805599453
    power_N = np.rint(x_N / ln2)
    rest_N = x_N - power_N * ln2
    sum_N = np.ones_like(x_N)
    for degree in range(14, 0, -1):
        sum_N = 1 + sum_N * rest_N / degree
    return np.ldexp(sum_N, power_N.astype(np.int32))
