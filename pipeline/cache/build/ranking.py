"""Where a class stands among the logits of a row: one rule for students and teachers, with an order for ties."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def class_ranks(logits_NK: NDArray[np.float32], class_N: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """int64 [N], from 0: the number of larger logits, plus the number of equal ones with a lower class index.

    So each class of a row has another rank, and a row of equal logits ranks class 0 first, as ``predicted_classes``
    does. ``topk`` of any library leaves the order of ties open.

    Args:
        logits_NK: finite; a NaN compares as neither larger nor equal, so a row of NaNs would rank its class first.
        class_N: from 0 to K - 1.
    """
    class_N1 = class_N.astype(np.int64)[:, None]
    own_N1 = np.take_along_axis(logits_NK, class_N1, 1)
    is_lower_NK = np.arange(logits_NK.shape[1]) < class_N1
    return ((logits_NK > own_N1) | ((logits_NK == own_N1) & is_lower_NK)).sum(1)


def predicted_classes(logits_NK: NDArray[np.float32]) -> NDArray[np.int64]:
    """int64 [N]: the class of rank 0. NumPy documents that its argmax is the first of equal values."""
    return logits_NK.argmax(1)
