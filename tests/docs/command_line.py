"""docs/reference/cli.md from the command table of ``jobs/cli.py``."""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import typer
import typer.main

from jobs.cli import app

_EXIT_CODES = """| exit code | meaning |
|---|---|
| 0 | success |
| 2 | bad input: the message has what, where, got, expected and the next step |
| 1 | any other failure |
| 130 | Ctrl-C: committed work stays, and the command that resumes is printed |"""


def title() -> str:
    return (
        "# Command line\n\n"
        "The `stillroom` command. `CONFIG` is a YAML file or URL; after it, `section.key=value` overrides a key\n"
        "([configuration](config.md)). `stillroom COMMAND --help` prints the same text as this page."
    )


def sections() -> Iterator[str]:
    yield _EXIT_CODES
    yield from _command_sections(typer.main.get_command(app), "stillroom")


def _command_sections(command: Any, path: str) -> Iterator[str]:
    children = getattr(command, "commands", None)
    if children is not None:
        for name, child in children.items():
            yield from _command_sections(child, f"{path} {name}")
        return
    parameters = [item for item in command.get_params(typer.Context(command)) if item.name != "help"]
    arguments = [item for item in parameters if item.param_type_name == "argument"]
    options = [item for item in parameters if item.param_type_name == "option"]
    yield f"## {path}"
    yield _cell(command.help)
    usage = " ".join([path, *map(_argument_name, arguments), *(["[OPTIONS]"] if options else [])])
    yield f"```\n{usage}\n```"
    rows = [*map(_argument_row, arguments), *map(_option_row, options)]
    if rows:
        yield "\n".join(["| argument or option | default | meaning |", "|---|---|---|", *rows])


def _argument_name(argument: Any) -> str:
    choices = _choices(argument)
    return "|".join(choices) if choices else argument.metavar or argument.name.upper()


def _argument_row(argument: Any) -> str:
    default = "required" if argument.required else ""
    return f"| `{_escape(_argument_name(argument))}` | {default} | {_cell(argument.help)} |"


def _option_row(option: Any) -> str:
    spelling = "/".join([*option.opts, *option.secondary_opts])
    value = "" if option.is_flag else " " + _value_name(option)
    return f"| `{_escape(spelling + value)}` | {_default(option)} | {_cell(option.help)} |"


def _value_name(option: Any) -> str:
    if choices := _choices(option):
        return "|".join(choices)
    kinds = [kind for kind in _kinds(option.type_descriptor.annotation) if kind is not NoneType]
    return option.metavar or {int: "N", float: "NUMBER"}.get(kinds[0], "TEXT")


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if option.is_flag:
        return f"`{option.opts[0]}`" if option.default else ""
    return "" if option.default in (None, (), []) else f"`{option.default}`"


def _choices(parameter: Any) -> list[str]:
    return [str(choice) for kind in _kinds(parameter.type_descriptor.annotation) for choice in _literals(kind)]


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return (annotation,) if get_origin(annotation) in (Literal, None) else get_args(annotation)


def _literals(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) is Literal else ()


def _cell(text: str | None) -> str:
    return _escape(" ".join((text or "").split()))


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
