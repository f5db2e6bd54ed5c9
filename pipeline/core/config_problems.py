"""Validation errors of pydantic as errors of a YAML author: key, line, value, expected value, nearest name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic_core import ErrorDetails

from pipeline.core.config_overrides import echo
from pipeline.core.config_schema import known_names, loss_names, missing_description
from pipeline.core.errors import ConfigError
from pipeline.core.yaml_document import KeyPath


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with one key."""

    path: KeyPath
    what: str
    got: str | None = None
    expected: str | None = None
    hint: str | None = None


def problem_of(error: ErrorDetails, tree: Mapping[str, Any]) -> Problem:
    path, context, value = _yaml_path(error["loc"], tree), error.get("ctx", {}), error["input"]
    match error["type"]:
        case "extra_forbidden":
            known = known_names(error["loc"][:-1])
            return Problem(path, "unknown key", expected=", ".join(known), hint=nearest(str(path[-1]), known))
        case "missing":
            return Problem((*path, error["loc"][-1]), "missing key", expected=missing_description(error["loc"]))
        case "union_tag_invalid":
            known = context["expected_tags"].replace("'", "").split(", ")
            hint = nearest(str(context["tag"]), known)
            return Problem((*path, "name"), "unknown loss", repr(context["tag"]), ", ".join(known), hint)
        case "union_tag_not_found":
            return Problem((*path, "name"), "missing key", expected=", ".join(loss_names()))
        case "value_error":
            got, _, expected = str(context["error"]).partition("; wanted ")
            what = "values that do not go together" if isinstance(value, Mapping) else "wrong value"
            return Problem(path, what, got, expected or None)
        case _:
            return Problem(path, "wrong value", _describe(value), _expected(error["msg"]))


def _yaml_path(loc: KeyPath, tree: Any) -> KeyPath:
    """Pydantic's location without what is not in the document: names of union members, and the key that is missing."""
    path: list[str | int] = []
    for part in loc:
        children: Any = dict(enumerate(tree)) if isinstance(tree, list | tuple) else tree
        if isinstance(children, Mapping) and part in children:
            tree = children[part]
            path.append(part)
    return tuple(path)


def merged_problems(problems: Iterable[Problem]) -> list[Problem]:
    """One problem a key: a union complains once for every member, deepest last."""
    merged: dict[KeyPath, Problem] = {}
    for problem in problems:
        first = merged.get(problem.path)
        if first is not None and first.expected and problem.expected:
            problem = Problem(first.path, first.what, first.got, f"{first.expected} or {problem.expected}", first.hint)
        merged[problem.path] = problem
    return [problem for path, problem in merged.items() if not any(is_inside(other, path) for other in merged)]


def is_inside(path: KeyPath, section: KeyPath) -> bool:
    return len(path) > len(section) and path[: len(section)] == section


def config_error(problems: Sequence[Problem], where: str, places: Mapping[KeyPath, str]) -> ConfigError:
    if len(problems) == 1:
        (one,) = problems
        return ConfigError(
            f"{one.what}: {_dotted(one.path)}" if one.path else one.what,
            where=where + _place(one.path, places),
            got=one.got,
            expected=one.expected,
            next_step=one.hint,
        )
    listed = "".join(
        f"\n    {_dotted(problem.path)}{_place(problem.path, places)}: {_one_line(problem)}" for problem in problems
    )
    return ConfigError(f"{len(problems)} keys of this config are wrong", where=where, got=listed)


def _one_line(problem: Problem) -> str:
    details = (
        f"got {problem.got}" if problem.got else None,
        problem.hint or (f"wanted {problem.expected}" if problem.expected else None),
    )
    return "; ".join([problem.what, *filter(None, details)])


def _place(path: KeyPath, places: Mapping[KeyPath, str]) -> str:
    """Where the key was written, or what it should stand in; nothing for a tree that was never text."""
    inside = [known for known in places if is_inside(known, path)]
    around = [path[:length] for length in range(len(path) - 1, 0, -1)]
    return next((f", {places[known]}" for known in (path, *inside, *around) if known in places), "")


def _dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)


def _describe(value: Any) -> str:
    kinds = {dict: "a mapping", list: "a list", str: "text", bool: "true/false", type(None): "null"}
    kind = kinds.get(type(value), "a number")
    return kind if value is None or isinstance(value, dict | list) else f"{echo(value)} ({kind})"


def _expected(message: str) -> str:
    """Pydantic's own words, in those of a YAML author."""
    expected = message.removeprefix("Input should be ").split(" or instance of")[0].split(", unable to parse")[0]
    words = {"dictionary": "mapping", "tuple": "list", "string": "text", "boolean": "true or false"}
    plain = expected.removeprefix("a valid ")
    return words.get(plain, plain)


def nearest(name: str, known: Sequence[str]) -> str | None:
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else None
