"""Cause and remedy of every error code, as listed in ``schemas/errors.toml``."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files

from pipeline.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ErrorCode:
    """One entry of the list.

    Attributes:
        cause: when the error is raised.
        remedy: what to do about it.
        former: its code in earlier versions, if that differs.
    """

    code: str
    cause: str
    remedy: str
    former: str | None = None


def error_codes() -> dict[str, ErrorCode]:
    """All entries by code, sorted."""
    tree = tomllib.loads(files("schemas").joinpath("errors.toml").read_text(encoding="utf-8"))
    return {code: ErrorCode(code, **entry) for code, entry in sorted(tree.items())}


def explain(code: str) -> ErrorCode:
    """The entry of a code. A former code has the entry of its current name.

    Raises:
        ConfigError: no error has this code.
    """
    entries = error_codes()
    entry = entries.get(code) or next((entry for entry in entries.values() if entry.former == code), None)
    if entry is None:
        close = get_close_matches(code, entries, n=1)
        raise ConfigError(
            "no error has this code",
            code="explain.unknown-code",
            got=code,
            expected="AREA.NAME, as the first line of a message has it in brackets",
            next_step=f"run: stillroom explain {close[0]}" if close else "run: stillroom explain",
        )
    return entry
