"""Outputs by the value of the config, and a round trip through a column."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.cache.format.codec import RowIdentity, decode, encode, stored_outputs
from pipeline.tasks import OutputSpec
from schemas.cache_format import Output
from tests.tolerances import ulps


def logits_output(kind: str, num_classes: int) -> Output:
    return stored_outputs([OutputSpec("logits", (num_classes,), kind)])[0]


def identity_of(values: NDArray[np.float32]) -> RowIdentity:
    """View 0 of samples that are named by their numbers."""
    return RowIdentity([row.tobytes().hex() for row in values], 0)


def encoded(values: NDArray[np.float32], output: Output) -> pa.Array:
    return encode(values, output, identity=identity_of(values))


def stored(values_NK: NDArray[np.float32], kind: str) -> list[bytes]:
    return encoded(values_NK, logits_output(kind, values_NK.shape[1])).to_pylist()


def round_trip(values_NK: NDArray[np.float32], kind: str, *, temperature: float = 1.0) -> NDArray[np.float64]:
    output = logits_output(kind, values_NK.shape[1])
    decoded = decode(encoded(values_NK, output), output, temperature=temperature)
    assert decoded.dtype == np.float32
    assert decoded.shape == values_NK.shape
    return decoded.astype(np.float64)


def steps_error(values_K: NDArray[np.float64]) -> float:
    """The rounding of fp32 in steps of log(1 + d / 3) over a row: the error of a number in addition to half a step.

    Difference, quotient, log, division by the number of steps, and the same again for a number's code; then code times
    step: 8 operations on an exponent, of which an error weighs d + 3 times as much in a distance d. Then exp, factor,
    knee and difference.
    """
    span = 2 * float(np.abs(values_K).max()) + 3
    return ulps(8 * float(np.log1p(span / 3)) + 4, span)


def teacher_like(rows: int, num_classes: int, seed: int = 0) -> NDArray[np.float32]:
    """Normal logits with one class that stands out, like those of a trained teacher."""
    random = np.random.default_rng(seed)
    values = random.normal(0, 2.5, (rows, num_classes))
    values[np.arange(rows), random.integers(0, num_classes, rows)] += random.uniform(2, 12, rows)
    return values.astype(np.float32)


def softmax(values_NK: NDArray[np.floating], temperature: float) -> NDArray[np.float64]:
    scaled = values_NK.astype(np.float64) / temperature
    scaled = np.exp(scaled - scaled.max(1, keepdims=True))
    return scaled / scaled.sum(1, keepdims=True)
