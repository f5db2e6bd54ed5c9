"""The tables of docs/reference/config.md. Keys, types and defaults come from the schema.

The column "meaning" may be longer than the description in the schema, which error messages quote: the text on the page
is preserved, and a new key starts with its description.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from schemas.config import Config, LossConfig, LossSection
from schemas.recipe import GridConfig, LongTailConfig, RecipeConfig

Default = Any
_HEAD = "| key | type | default | meaning |\n|---|---|---|---|\n"
_TABLE = re.compile(rf"^{re.escape(_HEAD)}((?:\| .*\n)*)", re.MULTILINE)
# Types that the annotation does not tell: a text with a pattern, and what a validator adds.
_TYPES = {
    "cache.logits": "`auto` or `fp32` or `fp16` or `int8` or `int8t` or `int4` or `topk:k` or `sampled:n@T` or `head` "
    "or `none`",
    "cache.class_means": "`none` or `eval` or `view0` or URL",
    "teacher.standardize": "`none` or `mean_std` or `phi_s`, or a list of these",
    "loss.name": "text",
}


def sections() -> dict[str, type[BaseModel]]:
    """Heading on the page to the model that its table describes."""
    found: dict[str, type[BaseModel]] = {"loss": LossSection}
    for name, field in Config.model_fields.items():
        for model in filter(_is_section, (field.annotation, *get_args(field.annotation))):
            found[name] = model
            for option, inner in model.model_fields.items():
                # A section that is also a section of the document has its own heading.
                for kind in filter(_is_section, get_args(inner.annotation)):
                    if option not in Config.model_fields:
                        found[f"{name}: {option}"] = kind
    found |= {"Recipes": RecipeConfig, "Recipes: grid": GridConfig, "Recipes: subsets": LongTailConfig}
    return found | {f"loss: {name}": model for name, model in losses().items()}


def losses() -> dict[str, type[BaseModel]]:
    """The section of every loss, by its name in YAML."""
    return {get_args(model.model_fields["name"].annotation)[0]: model for model in get_args(get_args(LossConfig)[0])}


def rows(heading: str, model: type[BaseModel]) -> Iterator[tuple[str, str, Default, str]]:
    """Key, type, default and description of each row of a section's table."""
    common = {"name", *LossSection.model_fields} if heading.startswith("loss: ") else set[str]()
    for key, field in model.model_fields.items():
        if key not in common:
            default = "required" if field.is_required() else _plain(field.get_default(call_default_factory=True))
            yield key, type_text(f"{heading}.{key}", field), default, field.description or ""


def filled(text: str) -> str:
    """The page with regenerated tables."""
    parts = re.split(r"(^#+ .+$)", text, flags=re.MULTILINE)
    for index in range(1, len(parts), 2):
        heading = parts[index].lstrip("#").strip()
        if heading in sections():
            parts[index + 1] = _TABLE.sub(lambda match, of=heading: _table(of, match[1]), parts[index + 1], count=1)
    return "".join(parts)


def _table(heading: str, written: str) -> str:
    meanings = dict(re.findall(r"^\| `(\w+)` \| .+? \| (?:required|`.*?`) \| (.+) \|$", written, re.MULTILINE))
    lines = [
        f"| `{key}` | {kind} | {_default_text(default)} | {meanings.get(key, description)} |\n"
        for key, kind, default, description in rows(heading, sections()[heading])
    ]
    return _HEAD + "".join(lines)


def _default_text(default: Default) -> str:
    return "required" if default == "required" else f"`{yaml_text(default)}`"


def yaml_text(value: Any) -> str:
    """A value as one line of YAML, as an author writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str | int | float):
        return str(value)
    return yaml.safe_dump(value, default_flow_style=True, width=1000).strip()


def type_text(key: str, field: FieldInfo) -> str:
    return _TYPES.get(key) or _with_bounds(_annotation_text(field.annotation), field.metadata)


def _annotation_text(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _with_bounds(_annotation_text(arguments[0]), arguments[1:])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        kinds = [_annotation_text(kind) for kind in arguments if kind is not NoneType]
        text = " or ".join(dict.fromkeys(kinds))
        comma = "," if any(sign in text for sign in _SIGNS.values()) else ""
        return f"{text}{comma} or null" if NoneType in arguments else text
    if origin is tuple:
        count = "" if Ellipsis in arguments else f"{len(arguments)} "
        return f"list of {count}{_plural(_annotation_text(arguments[0]))}"
    if origin is dict or annotation is dict:
        return "mapping"
    if _is_section(annotation):
        return "section"
    return {str: "text", int: "integer", float: "number", bool: "`true` or `false`"}[annotation]


def _plural(text: str) -> str:
    word, space, rest = text.partition(" ")
    return f"{word}s{space}{rest}"


_SIGNS = {annotated_types.Ge: "≥", annotated_types.Gt: ">", annotated_types.Le: "≤", annotated_types.Lt: "<"}


def _with_bounds(text: str, metadata: Iterable[Any]) -> str:
    items = [inner for item in metadata for inner in (item.metadata if isinstance(item, FieldInfo) else (item,))]
    bounds = [
        f"{sign} {_bound(getattr(item, kind.__name__.lower()))}"
        for item in items
        for kind, sign in _SIGNS.items()
        if isinstance(item, kind)
    ]
    if not bounds:
        return text
    before, null, after = text.partition(" or null")
    return f"{before} {', '.join(bounds)}{',' if null else ''}{null}{after}"


def _bound(value: float) -> str:
    return "2⁶³" if value == 2**63 else f"{value:g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _is_section(kind: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
