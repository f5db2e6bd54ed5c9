"""Sizes of inputs in pixels: one number for a square, or [height, width]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, Field

Size = int | tuple[int, int]
"""Height and width in pixels. A square is always one number, so that its records and ids have one form."""

_Side = Annotated[int, Field(ge=1)]


def size_of(value: int | Sequence[int]) -> Size:
    """The size in a record, which has a list for a pair."""
    if isinstance(value, int):
        return value
    height, width = value
    return height if height == width else (height, width)


def height_width(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def size_json(size: Size) -> int | list[int]:
    """What ``size_of`` reads."""
    return size if isinstance(size, int) else list(size)


def size_text(size: Size) -> str:
    """``224`` or ``512×1024``."""
    return str(size) if isinstance(size, int) else f"{size[0]}×{size[1]}"


SizeKey = Annotated[_Side | tuple[_Side, _Side], AfterValidator(size_of)]
"""A key of the config with a size."""
