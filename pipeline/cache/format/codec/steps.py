"""Steps down from the largest number of a row, equal in log(1 + d / 3), where d is the distance in nats.

What is near the top weighs most in any softmax and gets the finest steps; those far below widen in proportion.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_KNEE = 3.0


def step_of(below_NC: NDArray[np.floating], last: int) -> NDArray[np.floating]:
    """[N,1]: the step with which code ``last`` reaches the farthest of each row."""
    return np.log1p(below_NC.max(axis=1, keepdims=True) / _KNEE) / last


def to_codes(below_NC: NDArray[np.floating], step_N1: NDArray[np.floating], last: int) -> NDArray[np.uint8]:
    """The nearest code, 0 to ``last``, of distances below the top."""
    # A step of zero means that all of a row are its top.
    steps_NC = np.log1p(np.maximum(below_NC, 0) / _KNEE) / np.where(step_N1 > 0, step_N1, np.float32(np.inf))
    return np.minimum(np.rint(steps_NC), last).astype(np.uint8)


def from_codes(codes_NC: NDArray[np.integer], step_N1: NDArray[np.floating]) -> NDArray[np.float32]:
    """Distances below the top."""
    return (_KNEE * np.expm1(step_N1.astype(np.float32) * codes_NC.astype(np.float32))).astype(np.float32, copy=False)
