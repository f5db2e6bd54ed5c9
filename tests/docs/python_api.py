"""docs/reference/python.md from the docstrings of public names, and docs/reference/modules.md from those of modules."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import stillroom
from schemas.config import Config
from stillroom import losses

_ROOT = Path(__file__).resolve().parents[2]
_LAYERS = {
    "stillroom": "The public API: the names of `import stillroom`.",
    "schemas": "Configuration and file formats. No I/O and no torch.",
    "pipeline": "Everything from tar files to trained students. It never imports Ray.",
    "jobs": "Entry points. The only layer that imports Ray.",
}


_TITLE = """# Python API

The names of `import stillroom` are the public interface; the modules behind them may change.
[Your own training loop](../tutorials/your-own-loop.md) shows them in use. Suffixes of names give shapes: `B` batch,
`K` classes, `D` embedding, `C H W` image."""
_MODULES_TITLE = """# Modules

For contributors: every module with the first sentence of its docstring.
[Architecture](../explanation/architecture.md) explains how they work together."""


def title() -> str:
    return _TITLE


def sections() -> Iterator[str]:
    for name in sorted(set(stillroom.__all__) - {"losses"}):
        yield from _entry(f"stillroom.{name}", getattr(stillroom, name))
    yield "## stillroom.losses"
    yield _as_markdown(inspect.cleandoc(losses.__doc__ or ""))
    for name in losses.LOSSES:
        if hasattr(losses, name):
            yield from _entry(f"stillroom.losses.{name}", getattr(losses, name), level=3)


def _entry(path: str, value: Any, *, level: int = 2) -> Iterator[str]:
    yield f"{'#' * level} {path}"
    if value is Config:
        # Its sections are the configuration page.
        yield f"{_markdown(value)}\n\nEvery section is described in [Configuration](config.md)."
        return
    yield f"```python\n{_signature(path.rpartition('.')[2], value)}\n```"
    yield _markdown(value)
    if inspect.isclass(value) and value.__init__ is not object.__init__ and _own_doc(value.__init__):
        yield _markdown(value.__init__)
    for member_name, member in _members(value) if inspect.isclass(value) else ():
        text = _own_doc(member.fget if isinstance(member, property) else member)
        call = member_name if isinstance(member, property) else _signature(member_name, member, drop_self=True)
        yield f"**`{call}`**" + (f"\n\n{_as_markdown(text)}" if text else "")


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    for name, member in vars(kind).items():
        if not name.startswith("_") and (isinstance(member, property) or inspect.isfunction(member)):
            yield name, member


def _signature(name: str, value: Any, *, drop_self: bool = False) -> str:
    try:
        signature = inspect.signature(value)
    except ValueError:
        return name
    parameters = [item for item in signature.parameters.values() if not (drop_self and item.name == "self")]
    text = str(signature.replace(parameters=parameters)).replace("'", "")
    text = re.sub(r"\b(?:torch|pipeline|collections|typing)\.(?:\w+\.)*", "", text)
    if len(name + text) <= 100 or drop_self:
        return name + text
    # The prefixes of modules, but not the digits before a decimal point.
    listed = [re.sub(r"\b(?:[^\W\d]\w*\.)+(?=\w)", "", str(item).replace("'", "")) for item in parameters]
    first_keyword = next((at for at, item in enumerate(parameters) if item.kind is item.KEYWORD_ONLY), None)
    if first_keyword is not None:
        listed.insert(first_keyword, "*")
    returned = text.rpartition(" -> ")
    return f"{name}(\n    " + ",\n    ".join(listed) + f",\n){returned[1]}{returned[2] if returned[1] else ''}"


def _own_doc(value: Any) -> str:
    return inspect.cleandoc(value.__doc__) if getattr(value, "__doc__", None) else ""


def _markdown(value: Any) -> str:
    return _as_markdown(_own_doc(value))


def _as_markdown(text: str) -> str:
    """A docstring in Google's form: double backticks become single ones, and its sections become lists."""
    text = text.replace("``", "`")
    blocks: list[str] = []
    for block in text.split("\n\n"):
        head, _, rest = block.partition("\n")
        if head.rstrip(":") in ("Args", "Attributes", "Raises", "Returns") and head.endswith(":"):
            blocks.append(f"*{head.rstrip(':')}*\n\n{_listed(rest)}")
        else:
            blocks.append(block)
    return "\n\n".join(blocks)


def _listed(text: str) -> str:
    text = inspect.cleandoc("\n" + text)
    items = re.split(r"\n(?=\S)", text)
    joined = [" ".join(line.strip() for line in item.splitlines()) for item in items]
    return "\n".join(
        re.sub(r"^([\w, ]+): ", lambda match: f"- `{match[1]}`: ", item) if ": " in item else f"- {item}"
        for item in joined
    )


def modules_title() -> str:
    return _MODULES_TITLE


def module_sections() -> Iterator[str]:
    for layer, meaning in _LAYERS.items():
        yield f"## {layer}\n\n{meaning}"
        rows = [
            f"| `{path.relative_to(_ROOT)}` | {_first_sentence(path)} |"
            for path in sorted((_ROOT / layer).rglob("*.py"))
            if path.name != "__init__.py" or layer == "stillroom"
        ]
        yield "\n".join(["| module | subject |", "|---|---|", *rows])


def _first_sentence(path: Path) -> str:
    paragraph = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n\n")[0]
    text = " ".join(paragraph.replace("``", "`").split())
    sentence = re.split(r"(?<=\.)\s+(?=[A-Z`])", text, maxsplit=1)[0]
    return sentence.replace("|", "\\|")
