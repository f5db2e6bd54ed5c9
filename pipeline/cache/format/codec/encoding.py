"""The interface of an encoding, and what several encodings share: the k largest numbers of a row, logarithmic steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import ConfigError
from schemas.cache_format import Output, RowField

Rows = NDArray[np.void]
"""[N] stored rows: a structured array with the fields of an output."""

_KNEE = 3.0


@dataclass(frozen=True, slots=True, eq=False)
class RowIdentity:
    """Which rows are encoded: their sample ids, and their view, or one for each."""

    sample_ids: Sequence[str]
    view: int | NDArray[np.integer]

    def take(self, row_M: NDArray[np.integer]) -> RowIdentity:
        """The rows at these positions."""
        sample_ids = [self.sample_ids[int(row)] for row in row_M]
        return RowIdentity(sample_ids, self.view if isinstance(self.view, int) else self.view[row_M])


@dataclass(frozen=True, slots=True)
class Encoding:
    """A way to store rows of D fp32 numbers in a fixed number of bytes.

    Attributes:
        name: the encoding in the header of a cache.
        kinds: the values of ``cache.logits`` and ``cache.embeddings`` that select it, up to a colon.
        describe: the output for (its name, its shape of D numbers, the value of the config). Raises ConfigError where D
            is too small.
        pack: fills the fields of zeroed rows from [N,D] fp32, the output, and which rows they are, where the encoding
            depends on it. A number that does not fit becomes infinite in a float field.
        unpack: [N,D] fp32 as a loss at the given temperature sees them.
        depends_on_temperature: whether ``unpack`` is a function of the temperature.
    """

    name: str
    kinds: tuple[str, ...]
    describe: Callable[[str, tuple[int, ...], str], Output]
    pack: Callable[[NDArray[np.float32], Rows, Output, RowIdentity | None], None]
    unpack: Callable[[Rows, Output, float], NDArray[np.float32]]
    depends_on_temperature: bool = False


def check_num_classes(kind: str, num_classes: int, *, minimum: int, next_step: str) -> None:
    """
    Raises:
        ConfigError: there are fewer classes than the encoding needs.
    """
    if num_classes < minimum:
        raise ConfigError(
            f"{kind} needs more classes",
            code="config.too-few-classes",
            where="cache.logits",
            got=f"{num_classes} classes",
            expected=f"at least {minimum}",
            next_step=next_step,
        )


def id_field(num_classes: int, k: int) -> RowField:
    """k class ids, in the narrowest of three types."""
    dtype = "|u1" if num_classes <= 1 << 8 else "<u2" if num_classes <= 1 << 16 else "<i4"
    return RowField(name="ids", dtype=dtype, count=k)


def largest(values_NK: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """[N,k] ids of the k largest numbers of each row, in descending order; of equal numbers, the lower id is first."""
    # One integer orders by descending number, then by ascending id, so ties do not depend on the selection algorithm.
    bits_NK = (values_NK + np.float32(0)).view(np.int32)
    descending_NK = np.where(bits_NK < 0, bits_NK & 0x7FFFFFFF, ~bits_NK)
    keys_NK = (descending_NK.astype(np.int64) << 32) | np.arange(values_NK.shape[1])
    first_Nk = np.partition(keys_NK, k - 1, axis=1)[:, :k]
    first_Nk.sort(axis=1)
    return first_Nk & 0xFFFFFFFF


# Logarithmic steps: code c stands for a distance d below the largest number of a row, equal steps in log(1 + d / 3).
# The distance is in nats: numbers near the top weigh most in any softmax and get the finest steps.


def step_of(below_NC: NDArray[np.floating], max_code: int) -> NDArray[np.floating]:
    """[N,1]: the step with which ``max_code`` reaches the largest distance of each row."""
    return np.log1p(below_NC.max(axis=1, keepdims=True) / _KNEE) / max_code


def to_codes(below_NC: NDArray[np.floating], step_N1: NDArray[np.floating], max_code: int) -> NDArray[np.uint8]:
    """The nearest codes, 0 to ``max_code``, of distances below the top."""
    # The step is zero where all numbers of a row are equal.
    steps_NC = np.log1p(np.maximum(below_NC, 0) / _KNEE) / np.where(step_N1 > 0, step_N1, np.float32(np.inf))
    return np.minimum(np.rint(steps_NC), max_code).astype(np.uint8)


def from_codes(codes_NC: NDArray[np.integer], step_N1: NDArray[np.floating]) -> NDArray[np.float32]:
    """Distances below the top."""
    return (_KNEE * np.expm1(step_N1.astype(np.float32) * codes_NC.astype(np.float32))).astype(np.float32, copy=False)
