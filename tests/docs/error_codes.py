"""docs/reference/errors.md: every error code with its cause and remedy, and the messages that it comes with."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from pipeline.core import errors
from pipeline.core.error_codes import error_codes

_ROOT = Path(__file__).resolve().parents[2]
# With a hyphen, which no key of the config has.
_CODE = re.compile(r"[a-z]+\.[a-z0-9]+(?:-[a-z0-9]+)+")


_TITLE = """# Error codes

Every error has a code, which stays the same when its message changes. A message begins with it in brackets, JSON
logs have it as `code`, and `stillroom explain CODE` prints the entry. Programs and tests should match the code.

An error prints what is wrong, then `where`, `got`, `expected` and `next` as far as they apply.
[Recover from a failure](../how-to/recover.md) groups the common ones by situation. Quoted lines are the messages of a
code, with … for the parts that vary."""


def title() -> str:
    return _TITLE


def sections() -> Iterator[str]:
    entries, messages = error_codes(), raised_messages()
    codes = sorted(all_codes())
    for area in sorted({code.partition(".")[0] for code in codes}):
        yield f"## {area}"
        for code in codes:
            if code.startswith(f"{area}."):
                yield f"### {code}"
                if code in entries:
                    yield f"{entries[code].cause}\n\n**Remedy:** {entries[code].remedy}"
                if code in messages:
                    yield "\n>\n".join(f"> {message}" for message in sorted(messages[code]))


@cache
def all_codes() -> frozenset[str]:
    """Codes of the list, codes given to errors, and texts of that form in the same areas, such as codes of a table."""
    codes = {*error_codes(), *raised_messages()}
    classes = {value.code for value in vars(errors).values() if isinstance(value, type) and hasattr(value, "code")}
    areas = {code.partition(".")[0] for code in codes | classes}
    texts = {
        node.value
        for _, node in product_nodes()
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value
    }
    return frozenset(codes) | {text for text in texts if _CODE.fullmatch(text) and text.partition(".")[0] in areas}


@cache
def raised_messages() -> dict[str, set[str]]:
    """Code to the first lines of its messages, with … for the parts that vary."""
    messages: dict[str, set[str]] = {}
    for _, node in product_nodes():
        if isinstance(node, ast.Call) and (code := _code(node)) and (message := first_argument(node)):
            messages.setdefault(code, set()).add(message)
    return messages


@cache
def product_nodes() -> tuple[tuple[Path, ast.AST], ...]:
    """Every call and constant of the product code's syntax trees, with the path of its file."""
    paths = (path for layer in ("schemas", "pipeline", "jobs") for path in sorted((_ROOT / layer).rglob("*.py")))
    nodes = ((path, node) for path in paths for node in ast.walk(ast.parse(path.read_text())))
    return tuple((path, node) for path, node in nodes if isinstance(node, ast.Call | ast.Constant))


def _code(call: ast.Call) -> str | None:
    values = [keyword.value for keyword in call.keywords if keyword.arg == "code"]
    return str(values[0].value) if values and isinstance(values[0], ast.Constant) and values[0].value else None


def first_argument(call: ast.Call) -> str | None:
    """The first argument as text, if it is text."""
    if not call.args:
        return None
    first = call.args[0]
    if isinstance(first, ast.JoinedStr):
        return "".join(str(item.value) if isinstance(item, ast.Constant) else "…" for item in first.values)
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else None
