"""How labels are written in the data: as numbers from 0 or 1, as names, or as other ids."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pydantic import Field, field_validator, model_validator

from schemas.config.section import Section

_NUM_NAMED = 3


class LabelSection(Section):
    """The classes of one target."""

    num_classes: int | None = Field(
        None, ge=2, description="K. Classes must lie in [0, K). Default: the number of classes."
    )
    classes: str | tuple[str, ...] | None = Field(
        None,
        description="Names of the classes 0 to K - 1: a list, or path or URL of a text file with a name a line, a "
        "JSON list, or the classes.json of a packing. Labels may be names then.",
    )
    label_offset: int = Field(0, ge=0, description="The number that the data has for class 0: 1 if it counts from 1.")
    label_map: str | dict[str, int | str | None] | None = Field(
        None,
        description="Class index or name for each label in the data, null for no label: a mapping, or path or URL of a "
        "JSON object, or of a text file with a label and a class a line. Other labels are errors.",
    )

    @model_validator(mode="before")
    @classmethod
    def _count_classes(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("num_classes") is None:
            classes: Any = values.get("classes")
            if isinstance(classes, list | tuple):
                return {**values, "num_classes": len(classes)}
        return values

    @field_validator("classes")
    @classmethod
    def _check_names(cls, classes: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if not isinstance(classes, tuple):
            return classes
        if wrong := [name for name in classes if not name or name != name.strip()]:
            raise ValueError(f"{_some(wrong)} {_are(wrong)} empty, or begins or ends with spaces")
        if repeated := [name for name, number in Counter(classes).items() if number > 1]:
            raise ValueError(f"{_some(repeated)} {_are(repeated)} given more than once; expected different names")
        return classes

    @field_validator("label_map", mode="before")
    @classmethod
    def _check_map(cls, label_map: Any) -> Any:
        """Labels in a YAML are numbers where they look like numbers."""
        if not isinstance(label_map, dict):
            return label_map
        entries: dict[Any, Any] = label_map
        if not entries:
            raise ValueError("the mapping is empty")
        if wrong := [label for label, value in entries.items() if isinstance(label, bool) or isinstance(value, bool)]:
            raise ValueError(f"{_some(wrong)}: a boolean, as YAML reads words such as no; expected quotes around it")
        return {str(label).strip(): value for label, value in entries.items()}

    @model_validator(mode="after")
    def _check_classes(self) -> LabelSection:
        names = self.classes if isinstance(self.classes, tuple) else ()
        if names and self.num_classes != len(names):
            raise ValueError(f"num_classes is {self.num_classes}, but classes has {len(names)} names")
        if self.label_map is not None and self.label_offset:
            raise ValueError("label_map and label_offset are given; expected one, since a map has every label")
        numbers = [
            name
            for number, name in enumerate(names, self.label_offset)
            if self.label_map is None and name.isdigit() and name != str(number)
        ]
        if numbers:
            raise ValueError(
                f"classes has the names {_some(numbers)}, but a label that is a number is a class index from "
                f"{self.label_offset}; expected names that are no numbers, or label_map"
            )
        if isinstance(self.label_map, dict):
            self._check_map_values(self.label_map, names)
        return self

    def _check_map_values(self, label_map: dict[str, int | str | None], names: tuple[str, ...]) -> None:
        if isinstance(self.classes, str):
            return
        end, names_of_classes = self.num_classes or 2**31, {*names}

        def has_class(value: int | str | None) -> bool:
            return value in names_of_classes if isinstance(value, str) else value is None or 0 <= value < end

        wrong = [f"{label}: {value}" for label, value in label_map.items() if not has_class(value)]
        if wrong:
            raise ValueError(
                f"label_map has {len(wrong)} of {len(label_map)} labels with no class, such as {_some(wrong)}; "
                f"expected integers in [0, {end}), or names of classes"
            )


def _some(values: list[Any]) -> str:
    more = ", …" if len(values) > _NUM_NAMED else ""
    return ", ".join(map(repr, values[:_NUM_NAMED])) + more


def _are(values: list[Any]) -> str:
    return "is" if len(values) == 1 else "are"
