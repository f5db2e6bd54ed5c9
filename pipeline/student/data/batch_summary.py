"""Short text for objects that hold tensors: shapes and types in place of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

_MAX_ITEMS = 2


class Summarised:
    """A dataclass (``repr=False``) whose ``repr`` is one short line. Fields that are None are left out."""

    __slots__ = ()

    def __repr__(self) -> str:
        instance: Any = self
        values = {field.name: getattr(instance, field.name) for field in fields(instance)}
        shown = ", ".join(f"{name}={_text(value)}" for name, value in values.items() if value is not None)
        return f"{type(self).__name__}({shown})"


def _text(value: object) -> str:
    """``uint8[8,3,32,32]`` for a tensor, with its device where that is not the CPU; of a list its first items."""
    if isinstance(value, Tensor):
        shape = ",".join(map(str, value.shape))
        device = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{str(value.dtype).removeprefix('torch.')}[{shape}]{device}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_text(item)}' for key, item in value.items())}}}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        items = [_text(item) for item in value[:_MAX_ITEMS]]
        return f"[{', '.join([*items, *([f'… {len(value)} in all'] if len(value) > _MAX_ITEMS else [])])}]"
    return repr(value)
