"""The base of all sections of the config: frozen, refuses unknown keys, and does not accept booleans as numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

Triple = tuple[float, float, float]
Level = Annotated[int, Field(ge=0, le=255)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A frozen group of keys that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_booleans(cls, values: Any) -> Any:
        """Pydantic would convert true to 1."""
        given: dict[str, Any] = values if isinstance(values, dict) else {}
        wrong = [
            InitErrorDetails(
                type=PydanticCustomError("boolean", "Input should be a valid number"), loc=loc, input=value
            )
            for name, field in cls.model_fields.items()
            if name in given and _takes_numbers(field.annotation)
            for loc, value in _booleans(given[name], (name,))
        ]
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return values


def local_path(path: str, *, key: str) -> str:
    """A local path. A URL is refused, because as a path it would name a folder such as ``s3:``."""
    if "://" in path:
        raise ValueError(f"{key} is {path!r}; expected a local path")
    return path


def _takes_numbers(annotation: Any) -> bool:
    kinds = list(_kinds(annotation))
    return (int in kinds or float in kinds) and bool not in kinds


def _kinds(annotation: Any) -> Iterator[Any]:
    """The annotation and all types inside it."""
    yield annotation
    for inner in get_args(annotation):
        yield from _kinds(inner)


def _booleans(value: Any, loc: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], bool]]:
    """The booleans in a value or list, with their locations."""
    if isinstance(value, bool):
        yield loc, value
    elif isinstance(value, list | tuple):
        for position, part in enumerate(value):
            yield from _booleans(part, (*loc, position))
