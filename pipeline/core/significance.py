"""Statistics of tables of results: intervals over seeds and over test images, and verdicts on differences.

The two intervals answer different questions and are reported apart: ``seed_interval`` is for other seeds on these test
images, ``image_interval`` for other test images with these trainings. Neither contains the variance of the teacher,
which a table with one teacher has to state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

LEVEL = 0.95
"""Coverage of every interval. A difference is distinguished if its p-value is below ``1 - LEVEL``."""

MIN_SEEDS = 3
"""With fewer seeds no difference gets a verdict: the interval would rest on a single deviation."""

Verdict = Literal["distinguished", "no effect", "not resolved"]

# Numbers of one block of bootstrap samples: 8 MB each.
_BLOCK = 2**20


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean of n values with its 95 % interval, which is infinite where n is too small for one.

    Attributes:
        n: number of seeds or of images. The mean of none is NaN.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def is_within(self, margin: float) -> bool:
        """Whether all of the interval is closer to zero than the margin."""
        return -margin < self.low and self.high < margin


@dataclass(frozen=True, slots=True)
class Comparison:
    """The difference of two table entries.

    Attributes:
        difference: over the seeds that both have.
        p: two-sided, of the paired t-test after Holm's correction; None with fewer than ``MIN_SEEDS`` seeds.
        verdict: ``distinguished``: p is below 5 %. ``no effect``: it is not, and the interval is within the margin that
            was named before the experiment. ``not resolved``: neither.
    """

    difference: Interval
    p: float | None
    verdict: Verdict


def seed_interval(values_S: Sequence[float]) -> Interval:
    """The mean over seeds with Student's t interval; a bootstrap of three to five seeds would be far too narrow.

    Args:
        values_S: one value for each seed. With the difference of two students for each seed the interval is paired.
    """
    n = len(values_S)
    mean = float(np.mean(values_S)) if n else math.nan
    half_width = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * _standard_error(values_S) if n > 1 else math.inf
    return Interval(mean, mean - half_width if n else -math.inf, mean + half_width if n else math.inf, n)


def image_interval(values_N: NDArray[np.float64], *, seed: int, num_samples: int = 10_000) -> Interval:
    """The mean over test images with the percentile interval of a bootstrap (Efron 1979).

    Images of several seeds are the same images: pass the mean over the seeds of each image, and for two students the
    difference of these means.

    Args:
        values_N: one value for each image, such as 1 for a hit. The time is proportional to the number of distinct
            values, which is small for hits.
        seed: determines the bootstrap samples.
    """
    num_images = len(values_N)
    assert num_images
    value_D, count_D = np.unique(values_N, return_counts=True)
    generator = np.random.Generator(np.random.Philox(seed))
    num_blocks = -(-num_samples * len(value_D) // _BLOCK)
    # How often each value occurs in a sample with replacement is multinomial.
    means = np.concatenate(
        [
            generator.multinomial(num_images, count_D / num_images, size=len(block)) @ value_D / num_images
            for block in np.array_split(np.arange(num_samples), num_blocks)
        ]
    )
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(np.mean(values_N)), float(low), float(high), num_images)


def compare(differences: Sequence[Sequence[float]], margins: Sequence[float | None]) -> list[Comparison]:
    """All comparisons of one table, in the same order.

    Args:
        differences: for each comparison the difference of each seed that both entries have.
        margins: for each comparison the largest difference without meaning, in the unit of the differences, as named
            before the experiment. None: there is none, so that no verdict is ``no effect``.
    """
    tested = [index for index, values_S in enumerate(differences) if len(values_S) >= MIN_SEEDS]
    corrected = dict(zip(tested, holm([_p_value(differences[index]) for index in tested]), strict=True))
    return [
        _compared(seed_interval(values_S), corrected.get(index), margin)
        for index, (values_S, margin) in enumerate(zip(differences, margins, strict=True))
    ]


def holm(p_C: Sequence[float]) -> list[float]:
    """The p-values of C comparisons, corrected so that the chance of any false rejection stays below the level, in the
    same order (Holm 1979)."""
    corrected, largest = [0.0] * len(p_C), 0.0
    for rank, index in enumerate(sorted(range(len(p_C)), key=p_C.__getitem__)):
        largest = max(largest, min(1.0, (len(p_C) - rank) * p_C[index]))
        corrected[index] = largest
    return corrected


def _compared(difference: Interval, p: float | None, margin: float | None) -> Comparison:
    verdict: Verdict = "not resolved"
    if p is not None and p < 1 - LEVEL:
        verdict = "distinguished"
    elif p is not None and margin is not None and difference.is_within(margin):
        verdict = "no effect"
    return Comparison(difference, p, verdict)


def _p_value(values_S: Sequence[float]) -> float:
    """Two-sided, of the t-test whether the mean is zero."""
    mean, error = float(np.mean(values_S)), _standard_error(values_S)
    if error == 0:
        return float(mean == 0)
    return float(2 * stdtr(len(values_S) - 1, -abs(mean) / error))


def _standard_error(values_S: Sequence[float]) -> float:
    return float(np.std(values_S, ddof=1)) / math.sqrt(len(values_S))
