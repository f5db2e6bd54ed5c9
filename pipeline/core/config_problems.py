"""Validation errors of a config as messages: key, line, value, expected value, nearest name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pipeline.core.errors import ConfigError
from pipeline.core.redaction import redact_text
from pipeline.core.yaml_document import KeyPath
from schemas.config import Config

_ECHO_LENGTH = 60
_CODES = {
    "unknown key": "config.unknown-key",
    "missing key": "config.missing-key",
    "unknown loss": "config.unknown-loss",
    "wrong value": "config.wrong-value",
    "conflicting values": "config.conflicting-values",
}


@dataclass(frozen=True, slots=True)
class _Problem:
    """One problem of one key. ``what`` is a key of ``_CODES``."""

    path: KeyPath
    what: str
    got: str | None = None
    expected: str | None = None
    hint: str | None = None


def config_error(
    error: ValidationError, tree: Mapping[str, Any], where: str, origins: Mapping[KeyPath, str]
) -> ConfigError:
    """All problems of a config in one error.

    Args:
        origins: the origin of each key in the text, such as ``line 7``; empty for a tree that was never text.
    """
    problems = _merged(_problem(details, tree) for details in error.errors(include_url=False))
    if len(problems) == 1:
        (problem,) = problems
        return ConfigError(
            f"{problem.what}: {_dotted(problem.path)}" if problem.path else problem.what,
            code=_CODES[problem.what],
            where=where + _origin(problem.path, origins),
            got=problem.got,
            expected=problem.expected,
            next_step=problem.hint,
        )
    listed = "".join(
        f"\n    {_dotted(problem.path)}{_origin(problem.path, origins)}: {_one_line(problem)}" for problem in problems
    )
    return ConfigError(
        f"{len(problems)} keys of this config are wrong", code="config.several-problems", where=where, got=listed
    )


def _problem(error: ErrorDetails, tree: Mapping[str, Any]) -> _Problem:
    path, context, value = _yaml_path(error["loc"], tree), error.get("ctx", {}), error["input"]
    match error["type"]:
        case "extra_forbidden":
            names = [name for model in _sections_at(error["loc"][:-1]) for name in model.model_fields]
            return _Problem(path, "unknown key", expected=", ".join(names), hint=_nearest(str(path[-1]), names))
        case "missing":
            return _Problem((*path, error["loc"][-1]), "missing key", expected=_missing_description(error["loc"]))
        case "union_tag_invalid":
            names = context["expected_tags"].replace("'", "").split(", ")
            hint = _nearest(str(context["tag"]), names)
            return _Problem((*path, "name"), "unknown loss", repr(context["tag"]), ", ".join(names), hint)
        case "union_tag_not_found":
            return _Problem((*path, "name"), "missing key", expected=", ".join(_loss_names()))
        case "value_error":
            got, _, expected = str(context["error"]).partition("; expected ")
            is_section = isinstance(value, Mapping) and _sections_at(error["loc"])
            what = "conflicting values" if is_section else "wrong value"
            return _Problem(path, what, got, expected or None)
        case _:
            return _Problem(path, "wrong value", _describe(value), _expected(error["msg"]))


def _yaml_path(loc: KeyPath, tree: Any) -> KeyPath:
    """Pydantic's location without the parts that the document lacks: names of union members, and a missing key."""
    path: list[str | int] = []
    for part in loc:
        children: Any = dict(enumerate(tree)) if isinstance(tree, list | tuple) else tree
        if isinstance(children, Mapping) and part in children:
            tree = children[part]
            path.append(part)
    return tuple(path)


def _merged(problems: Iterable[_Problem]) -> list[_Problem]:
    """One problem for each key: a union reports one for every member, deepest last."""
    merged: dict[KeyPath, _Problem] = {}
    for problem in problems:
        first = merged.get(problem.path)
        if first is not None and first.expected and problem.expected:
            problem = _Problem(first.path, first.what, first.got, f"{first.expected} or {problem.expected}", first.hint)
        merged[problem.path] = problem
    return [problem for path, problem in merged.items() if not any(is_inside(inner, path) for inner in merged)]


def is_inside(path: KeyPath, section: KeyPath) -> bool:
    return len(path) > len(section) and path[: len(section)] == section


def _one_line(problem: _Problem) -> str:
    details = (
        f"got {problem.got}" if problem.got else None,
        problem.hint or (f"expected {problem.expected}" if problem.expected else None),
    )
    return "; ".join([problem.what, *filter(None, details)])


def _origin(path: KeyPath, origins: Mapping[KeyPath, str]) -> str:
    """``, line 7``: the origin of the key, of one inside it, or of the section that should have it."""
    inside = [inner for inner in origins if is_inside(inner, path)]
    around = [path[:length] for length in range(len(path) - 1, 0, -1)]
    return next((f", {origins[candidate]}" for candidate in (path, *inside, *around) if candidate in origins), "")


def _dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)


def _describe(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    kind = kinds.get(type(value), "a number")
    return kind if value is None or isinstance(value, dict | list) else f"{echo(value)} ({kind})"


def _expected(message: str) -> str:
    """Pydantic's message in the terms of YAML."""
    expected = message.removeprefix("Input should be ").split(" or instance of")[0].split(", unable to parse")[0]
    terms = {"dictionary": "mapping", "tuple": "list", "string": "text", "boolean": "true or false"}
    plain = expected.removeprefix("a valid ")
    return terms.get(plain, plain)


def _nearest(name: str, candidates: Sequence[str]) -> str | None:
    close = get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else None


def echo(value: object) -> str:
    """A value for a message: short, and without the credentials that a URL may have."""
    text = repr(redact_text(value)) if isinstance(value, str) else str(value)
    return text if len(text) <= _ECHO_LENGTH else text[: _ECHO_LENGTH - 1] + "…"


def description(key: str) -> str:
    """The description of a dotted key in the schema."""
    *parents, name = key.split(".")
    for model in _sections_at(tuple(parents)):
        field = model.model_fields[name]
        sections = sections_of(field)
        losses = f"a list of terms, named {', '.join(_loss_names())}"
        return field.description or (sections[0].__doc__ if len(sections) == 1 else None) or losses
    raise AssertionError(f"{key} is not a key of the config")


def _missing_description(loc: KeyPath) -> str | None:
    fields = [model.model_fields.get(str(loc[-1])) for model in _sections_at(loc[:-1])]
    return next((field.description for field in fields if field), None)


def _loss_names() -> list[str]:
    return [name for model in sections_of(Config.model_fields["loss"]) for name in _tags(model)]


def _sections_at(loc: KeyPath) -> list[type[BaseModel]]:
    """The section at a location, or several if the location names no member of a union."""
    models: list[type[BaseModel]] = [Config]
    for part in loc:
        fields = [model.model_fields[part] for model in models if isinstance(part, str) and part in model.model_fields]
        if fields:
            models = [inner for field in fields for inner in sections_of(field)]
        else:
            models = [model for model in models if part in _tags(model)] or models
    return models


def _tags(model: type[BaseModel]) -> tuple[str, ...]:
    """The values of ``name`` by which a union selects this section."""
    field = model.model_fields.get("name")
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()


def sections_of(field: FieldInfo) -> list[type[BaseModel]]:
    """The sections that a field may hold: several for a union, none for a plain value."""
    return list(_models_in(field.annotation))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)
