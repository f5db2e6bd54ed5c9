"""From labels as data has them, numbers, names or other ids, to class indexes."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from schemas.config.labels import LabelSection

MAX_CLASS = 2**31 - 1
# int() would also accept 1_000, signs and digits of other scripts.
_NUMBER = re.compile(r"0*[0-9]{1,10}", re.ASCII)
_NUM_NAMED = 3


@dataclass(frozen=True, slots=True)
class ClassLabels:
    """How the labels of one target are written. Equal sections have equal labels.

    Attributes:
        names: of the classes 0 … K - 1; empty: they have none.
        offset: the number in the data that is class 0.
        entries: label and class of ``label_map``; None as a class: no label.
    """

    names: tuple[str, ...] = ()
    offset: int = 0
    entries: tuple[tuple[str, int | None], ...] | None = None
    _by_label: Mapping[str, int | None] = field(default_factory=dict[str, int | None], compare=False, repr=False)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> ClassLabels:
        """
        Args:
            settings: those keys of a ``LabelSection`` that differ from their defaults, and others.

        Raises:
            ValueError: they are not valid, or name files that have not been read.
        """
        keys = {key: settings[key] for key in LabelSection.model_fields if settings.get(key) is not None}
        section = LabelSection.model_validate(keys)
        if isinstance(section.classes, str) or isinstance(section.label_map, str):
            raise ValueError("classes or label_map is a file that has not been read; expected its content")
        names = section.classes or ()
        indexes: dict[str, int | None] = {name: index for index, name in enumerate(names)}
        if section.label_map is None:
            return cls(names, section.label_offset, None, indexes)
        by_label = {
            label: indexes[value] if isinstance(value, str) else value for label, value in section.label_map.items()
        }
        return cls(names, section.label_offset, tuple(sorted(by_label.items())), by_label)

    @property
    def settings(self) -> dict[str, Any]:
        """The keys that differ from their defaults, as JSON has them."""
        label_map = None if self.entries is None else dict(self.entries)
        values = {"classes": [*self.names], "label_offset": self.offset, "label_map": label_map}
        return {key: value for key, value in values.items() if value}

    def expected(self, num_classes: int | None) -> str:
        """What a label is, for messages."""
        if self.entries is not None:
            return f"one of the {len(self.entries)} labels of label_map ({some([label for label, _ in self.entries])})"
        end = (MAX_CLASS + 1 if num_classes is None else num_classes) + self.offset
        names = f", or one of {len(self.names)} class names ({some(self.names)})" if self.names else ""
        return f"an integer in [{self.offset}, {end}){names}"

    def find(self, label: object) -> int | None:
        """The class of a label, which may be larger than K allows; None: the map has null for it.

        Raises:
            ValueError: this is no label, under any number of classes.
        """
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise ValueError
        text = str(label).strip()
        if text in self._by_label:
            return self._by_label[text]
        index = int(text) - self.offset if self.entries is None and _NUMBER.fullmatch(text) else -1
        if not 0 <= index <= MAX_CLASS:
            raise ValueError
        return index

    def label(self, index: int) -> str | int:
        """A label that ``find`` reads as this class.

        Raises:
            KeyError: the map has none.
        """
        if self.entries is None:
            return index + self.offset
        return {number: label for label, number in reversed(self.entries)}[index]

    def hint(self, labels: Collection[str], num_classes: int | None, prefix: str) -> str:
        """Keys that would read all these labels, as texts of some samples of which one cannot be read.

        Args:
            prefix: of the keys, such as ``data.``.
        """
        numbers = [int(label) for label in labels if _NUMBER.fullmatch(label)]
        if self.entries is not None:
            return f"add these labels to {prefix}label_map, with null for those that are no class"
        if len(numbers) < len({*labels}):
            keys = "correct" if self.names else "set"
            return f"{keys} {prefix}classes (a list or file of the class names), or {prefix}label_map"
        first, count = min(numbers), max(numbers) - min(numbers) + 1
        if first > self.offset and count <= (num_classes or count):
            return f"set {prefix}label_offset={first} if class 0 has this number in the data, or {prefix}label_map"
        return f"set {prefix}num_classes={max(numbers) - self.offset + 1}, or correct the labels"


def some(texts: Sequence[str]) -> str:
    """The first of these, for messages."""
    return ", ".join(texts[:_NUM_NAMED]) + (", …" if len(texts) > _NUM_NAMED else "")


def json_value(text: bytes, path: Sequence[str]) -> Any:
    """The value at this path of keys in the JSON of a member; None: null, or nothing.

    Raises:
        ValueError: the member is no JSON, or has a path and is no JSON object.
    """
    try:
        value: Any = json.loads(text)
    except RecursionError as error:
        raise ValueError from error
    if path and not isinstance(value, dict):
        raise ValueError
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value
