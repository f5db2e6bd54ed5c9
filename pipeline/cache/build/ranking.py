"""The rank of a class among the logits of a row, with an order for ties: the same rule for students and teachers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def class_ranks(logits_NK: NDArray[np.float32], class_N: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """int64 [N], from 0: the number of larger logits, plus the number of equal logits with a lower class index.

    Each class of a row has a different rank, and class 0 of a row of equal logits has rank 0, as in
    ``predicted_classes``. Functions such as ``torch.topk`` do not define the order of ties.

    Args:
        logits_NK: finite. A NaN is neither larger nor equal, so in a row of NaNs any class would have rank 0.
        class_N: from 0 to K - 1.
    """
    class_N1 = class_N.astype(np.int64)[:, None]
    logit_N1 = np.take_along_axis(logits_NK, class_N1, 1)
    is_lower_NK = np.arange(logits_NK.shape[1]) < class_N1
    return ((logits_NK > logit_N1) | ((logits_NK == logit_N1) & is_lower_NK)).sum(1)


def predicted_classes(logits_NK: NDArray[np.float32]) -> NDArray[np.int64]:
    """int64 [N]: the class of rank 0. NumPy's argmax is documented to return the first of equal values."""
    return logits_NK.argmax(1)
