"""The target of one head: a class or a set of classes, read from a field of a JSON member and stored in a column."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.tasks.class_labels import ClassLabels, json_value
from pipeline.tasks.classification import NO_LABEL
from pipeline.tasks.task import (
    TargetColumn,
    Targets,
    TaskHead,
)

Label = int | tuple[int, ...]
"""A class, or for a multilabel head its classes in ascending order."""


@dataclass(frozen=True, slots=True)
class BitsColumn(TargetColumn):
    """int8 [N,K], 1 for the classes of a row and ``missing`` in all of a row without a target.

    A row is stored as K bits: class k is bit k mod 8, from the lowest, of byte k div 8. Spare bits are 0.
    """

    num_classes: int = 0

    def to_arrow(self, values_N: NDArray[Any]) -> pa.Array:
        bytes_NB = np.packbits(values_N == 1, axis=1, bitorder="little")
        is_missing_N = values_N[:, 0] == self.missing
        rows = [None if is_missing else row.tobytes() for row, is_missing in zip(bytes_NB, is_missing_N, strict=True)]
        return pa.array(rows, self.type)

    def to_numpy(self, column: pa.ChunkedArray) -> NDArray[Any]:
        is_missing_N = column.is_null().to_numpy()
        data = b"".join(column.fill_null(bytes(self.type.byte_width)).to_pylist())
        bytes_NB = np.frombuffer(data, np.uint8).reshape(-1, self.type.byte_width)
        bits_NK = np.unpackbits(bytes_NB, axis=1, bitorder="little").astype(np.int8)
        values_NK = bits_NK[:, : self.num_classes].copy()
        # A class that does not exist is as invalid as a number out of range.
        values_NK[bits_NK[:, self.num_classes :].any(1)] = 2
        values_NK[is_missing_N] = self.missing
        return values_NK


@dataclass(frozen=True, slots=True)
class Head(TaskHead):
    """One entry of ``data.heads``.

    Attributes:
        member: extension of the member that has the label, in lower case.
        path: of the label in that member's JSON.
        labels: how labels are written.
    """

    name: str
    num_classes: int
    member: str
    path: tuple[str, ...]
    labels: ClassLabels = field(default_factory=ClassLabels)

    @property
    def is_multilabel(self) -> bool:
        return self.kind == "multilabel"

    @property
    def target_column(self) -> TargetColumn:
        if not self.is_multilabel:
            return TargetColumn(self.column, pa.int32(), NO_LABEL)
        return BitsColumn(self.column, pa.binary(-(-self.num_classes // 8)), NO_LABEL, self.num_classes)

    @property
    def expected(self) -> str:
        """What the member has, for messages."""
        label = self.labels.expected(self.num_classes)
        content = f"a list, each different and {label}" if self.is_multilabel else label
        return f"{content}, or null, in {'.'.join(self.path)} of a JSON object"

    def find(self, text: bytes) -> Any:
        """What the member holds for this head; None: nothing.

        Raises:
            ValueError: the member is no JSON object.
        """
        return json_value(text, self.path)

    def label(self, value: Any) -> Label | None:
        """
        Raises:
            ValueError: this is no label, under any number of classes.
        """
        if not self.is_multilabel:
            return self.labels.find(value)
        if not isinstance(value, list):
            raise ValueError
        classes = [label for label in map(self.labels.find, value) if label is not None]
        # A map may have one class for several labels.
        if self.labels.entries is None and len(set(classes)) < len(classes):
            raise ValueError
        return tuple(sorted({*classes}))

    def encoded(self, label: Label) -> Any:
        """A value that ``label`` reads as this."""
        return [*map(self.labels.label, label)] if isinstance(label, tuple) else self.labels.label(label)

    def is_in_range(self, label: Label) -> bool:
        return max(label if isinstance(label, tuple) else (label,), default=0) < self.num_classes

    def rows(self, labels: Iterable[Label | None]) -> NDArray[Any]:
        """int32 [N], or int8 [N,K] of a multilabel head."""
        if not self.is_multilabel:
            return np.array([NO_LABEL if label is None else label for label in labels], np.int32)
        listed: list[Any] = list(labels)
        values_NK = np.zeros((len(listed), self.num_classes), np.int8)
        for row, classes in enumerate(listed):
            if classes is None:
                values_NK[row] = NO_LABEL
            else:
                # A head of a shard's first bytes may have classes that the config does not allow.
                values_NK[row, [k for k in classes if k < self.num_classes]] = 1
        return values_NK

    def num_invalid(self, targets: Targets) -> int:
        values = targets[self.column]
        if not self.is_multilabel:
            return int(((values < NO_LABEL) | (values >= self.num_classes)).sum())
        is_bit_NK = (values == 0) | (values == 1)
        return int((~(is_bit_NK.all(1) | (values == NO_LABEL).all(1))).sum())


def json_object(text: bytes) -> dict[str, Any]:
    value = json_value(text, ())
    if not isinstance(value, dict):
        raise ValueError
    return value
