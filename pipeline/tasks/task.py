"""The contract of a task: what the target of a sample is, which outputs a teacher has, and which statistics count."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.cache_format import Statistics
from schemas.config import CacheConfig, DataConfig

EMBEDDING = "embedding"
"""The output that the networks of all tasks have: [B,D], the input of their heads."""

Targets = Mapping[str, NDArray[Any]]
"""Target columns by name, [N] each; a row without a target has ``TargetColumn.missing``."""

TeacherOutputs = Mapping[str, NDArray[np.float32]]
"""Outputs of a teacher by the names of ``OutputSpec``, [N,…] each."""


@dataclass(frozen=True, slots=True)
class TargetColumn:
    """A column of integers that the index has for targets. Its name differs from those of ``index_schema``.

    Attributes:
        missing: stands in arrays for a sample without a target, which is null in the index.
    """

    name: str
    type: pa.DataType
    missing: int

    def to_arrow(self, values_N: NDArray[Any]) -> pa.Array:
        return pa.array(values_N, self.type, mask=values_N == self.missing)

    def to_numpy(self, column: pa.ChunkedArray) -> NDArray[Any]:
        return column.fill_null(self.missing).to_numpy()


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """An output that a cache may store for each row.

    Attributes:
        width: numbers in a row.
        kind: the encoding by its name in ``cache``; ``none``: not stored.
    """

    name: str
    width: int
    kind: str


class BadTargetError(ValueError):
    """A member that is no target. The reader of the shard adds sample and place."""

    def __init__(self, expected: str, *, next_step: str) -> None:
        super().__init__(expected)
        self.expected, self.next_step = expected, next_step


class StatisticsAccumulator(ABC):
    """Sums the task's fields of ``Statistics``: over rows, and over the statistics of parts."""

    @abstractmethod
    def add(self, outputs: TeacherOutputs, targets: Targets) -> None:
        """Adds N rows that are not mixed: the teacher's fp32 outputs, and the targets of the same samples."""

    @abstractmethod
    def add_part(self, statistics: Statistics) -> None:
        """Adds an earlier result. A cache may have millions of parts: none of them may stay in memory."""

    @abstractmethod
    def result(self) -> dict[str, Any]:
        """The task's fields of ``Statistics``."""


class Recount(ABC):
    """Derives the task's statistics of one part again, from stored outputs and the targets of the index."""

    @abstractmethod
    def add_view(self, mix_lambda_M: NDArray[np.float32], rows: slice) -> None:
        """Adds rows of a view, whether or not their outputs are finite."""

    @abstractmethod
    def add_outputs(self, name: str, values: NDArray[np.float32], rows: slice, *, exact: bool) -> None:
        """Adds the decoded rows of one output.

        Args:
            exact: the order of the values is that of the teacher's fp32 outputs, except for ties.
        """

    @abstractmethod
    def compare(self, stated: Statistics, expect: Callable[[str, object, object], object]) -> None:
        """Calls ``expect(what, got, expected)`` for each figure of a commit: a problem if the last two differ."""


class Task(ABC):
    """One kind of target. A task has no state: all methods may be called in any process and thread."""

    name: ClassVar[str]
    member_content: ClassVar[str]
    """What a member with a target holds, for messages."""
    max_bytes: ClassVar[int]
    """Of a member with a target. A longer one is not read, and parsed as empty."""
    required_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of a config without which no network can be built for the task."""
    columns: ClassVar[tuple[TargetColumn, ...]]
    statistics_fields: ClassVar[tuple[str, ...]]
    """Fields of ``Statistics`` that depend on targets, and therefore change when targets are read again."""

    @abstractmethod
    def settings(self, data: DataConfig) -> dict[str, Any]:
        """Settings that determine the target columns together with the tar; part of an index's settings."""

    @abstractmethod
    def member(self, data: DataConfig) -> str | None:
        """The extension, in lower case, of the member that holds the target; None: no targets are read."""

    @abstractmethod
    def parse(self, text: bytes, data: DataConfig) -> Any:
        """The target in a member's bytes.

        Raises:
            BadTargetError: it is no valid target.
        """

    @abstractmethod
    def try_parse(self, text: bytes) -> Any | None:
        """The target that some config would read in a member's bytes; None: they are a target under no config."""

    @abstractmethod
    def encode(self, target: Any) -> bytes:
        """The bytes of a member that ``parse`` reads as this target."""

    @abstractmethod
    def rows(self, targets: Iterable[Any | None]) -> dict[str, NDArray[Any]]:
        """The target columns of samples, from what ``parse`` returned for each; None: the sample has no target."""

    @abstractmethod
    def has_target(self, targets: Targets) -> NDArray[np.bool_]:
        """[N]: which rows have a target."""

    @abstractmethod
    def num_invalid(self, targets: Targets, *, num_classes: int) -> int:
        """The number of rows with a target that is not valid for a teacher of K classes."""

    @abstractmethod
    def widths(self, data: DataConfig) -> dict[str, int]:
        """Numbers in a row of each output that a network's head returns, by its name."""

    @abstractmethod
    def outputs(self, cache: CacheConfig, *, num_classes: int, embedding_dim: int) -> tuple[OutputSpec, ...]:
        """What a cache with this config stores for each row."""

    @abstractmethod
    def is_output(self, name: str) -> bool:
        """Whether this version reads an output with this name; a reader ignores the others of a cache."""

    @abstractmethod
    def accumulate(self) -> StatisticsAccumulator: ...

    @abstractmethod
    def recount(self, targets: Targets, *, mix_group: int, outputs: Iterable[str]) -> Recount:
        """
        Args:
            targets: of the part's usable rows.
            mix_group: number of neighbouring rows that mix among themselves.
            outputs: names of the stored outputs.
        """

    @abstractmethod
    def teacher_metrics(self, statistics: Statistics) -> dict[str, float | None]:
        """The teacher's quality as shares, by the names in texts, the most informative one first. None: unknown."""
