"""docs/operations.md quotes messages: each must be one that the code can print."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_VARIES = "\0"
_LEAST_MESSAGES = 40


def templates() -> Iterator[str]:
    """Every text in the code, with ``_VARIES`` for what an f-string fills in."""
    for folder in ("jobs", "pipeline"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(
                        str(piece.value) if isinstance(piece, ast.Constant) else _VARIES for piece in node.values
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


CODE = set(templates())


def quoted() -> list[str]:
    """First cells of the tables of failures, and the line about void commits."""
    text = (ROOT / "docs" / "operations.md").read_text()
    section = re.search(r"^## Recovering from each failure\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    return [
        *re.findall(r"^\| `([^`]+)` \|", section[1], re.MULTILINE),
        *re.findall(r"says `([^`]+)` and", section[1]),
    ]


def test_the_document_has_the_failures_of_every_part() -> None:
    assert len(quoted()) >= _LEAST_MESSAGES


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_one_of_the_code_s(message: str) -> None:
    assert message.replace("…", _VARIES) in CODE
