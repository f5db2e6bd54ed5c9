"""What an encoding is, and the k largest numbers of each row, which two of them keep apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from schemas.cache_format import Output, RowField

Rows = NDArray[np.void]
"""[N] stored rows: a structured array with the fields of an output."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """``pack`` fills the fields of zeroed rows from [N,D] fp32; one that does not fit ends with an infinity in a float
    field. ``unpack`` gives [N,D] fp32 as a loss at a temperature sees it."""

    pack: Callable[[NDArray[np.float32], Rows], None]
    unpack: Callable[[Rows, Output, float], NDArray[np.float32]]
    by_temperature: bool = False


def id_field(num_classes: int, k: int) -> RowField:
    """Class ids in the narrowest of three types."""
    dtype = "|u1" if num_classes <= 1 << 8 else "<u2" if num_classes <= 1 << 16 else "<i4"
    return RowField(name="ids", dtype=dtype, count=k)


def largest(values_NK: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """[N,k] ids of the k largest of each row, largest first; of equal numbers the lower id comes first."""
    # One integer orders by descending number, then by ascending id: so ties do not depend on how the selection works.
    bits_NK = (values_NK + np.float32(0)).view(np.int32)
    descending_NK = np.where(bits_NK < 0, bits_NK & 0x7FFFFFFF, ~bits_NK)
    keys_NK = (descending_NK.astype(np.int64) << 32) | np.arange(values_NK.shape[1])
    first_Nk = np.partition(keys_NK, k - 1, axis=1)[:, :k]
    first_Nk.sort(axis=1)
    return first_Nk & 0xFFFFFFFF
