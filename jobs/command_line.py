"""The parts of the ``stillroom`` command that its commands share: options, exit codes, versions, help."""

from __future__ import annotations

import functools
import json
import shlex
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any, Literal, TypeVar

import typer

from jobs.entry import run_command

Command = TypeVar("Command", bound=Callable[..., None])
ConfigArgument = Annotated[str, typer.Argument(help="YAML file or URL.", metavar="CONFIG")]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(help="Override section.key=value; the value is parsed as YAML.", metavar="[K.K=V]..."),
]
RayArgument = Annotated[
    list[str] | None,
    typer.Argument(
        help="Keys of the ray section, such as ray.address=auto; default: one process, ray.address=none.",
        metavar="[RAY.K=V]...",
    ),
]
CacheArgument = Annotated[str, typer.Argument(help="URL of the cache.", metavar="CACHE")]
RunArgument = Annotated[str, typer.Argument(help="URL of a run.")]
ShardsOption = Annotated[
    str | None, typer.Option(help="Location of the shards, {a..b} braces allowed; default: where the build read them.")
]
CheckpointOption = Annotated[Literal["best", "last"], typer.Option(help="Checkpoint to load.")]
ThreadsOption = Annotated[int, typer.Option(min=1, help="CPU threads.")]
PixelDriftOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=255,
        metavar="N",
        help="Levels of 255 by which canaries may differ on this machine; sets data.allow_pixel_drift.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def add_command(group: typer.Typer, name: str) -> Callable[[Command], Command]:
    """A decorator that adds a function to a group as a command. It ends as ``run_command`` describes."""

    def add(function: Command) -> Command:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            resume = shlex.join(["stillroom", *sys.argv[1:]])
            raise typer.Exit(run_command(lambda: function(*args, **kwargs), resume=resume))

        group.command(name)(run)
        return function

    return add


def run_job(name: str, config: str, overrides: list[str] | None, *, allow_pixel_drift: int | None = None) -> None:
    """Runs ``main`` of a job that uses Ray, after a line that announces the seconds of its imports."""
    from jobs.ray.address import announce
    from pipeline.storage.config_files import load_config

    drift = [] if allow_pixel_drift is None else [f"data.allow_pixel_drift={allow_pixel_drift}"]
    overrides = [*(overrides or []), *drift]
    announce(load_config(config, overrides).ray.address)
    import_module(f"jobs.{name}").main(config, overrides)


def print_report(report: Any, describe: Callable[[Any], str], *, as_json: bool) -> None:
    """Prints ``report.as_dict()`` as JSON, or the text of ``describe``."""
    print(json.dumps(report.as_dict(), indent=2) if as_json else describe(report))


def show_version(is_set: bool) -> None:
    """Prints the versions that a bug report needs, and exits."""
    if not is_set:
        return
    import platform
    from importlib.metadata import PackageNotFoundError, version

    def version_of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    print(f"stillroom {version_of('stillroom')}")
    print(f"python {platform.python_version()} on {platform.platform()}")
    for name in ("torch", "torchvision", "ray", "pyarrow", "webdataset", "fsspec", "timm", "numpy"):
        print(f"{name} {version_of(name)}")
    raise typer.Exit


def hide_types(command: Any) -> None:
    """Hides uninformative types in the help: ``<bool>`` of a flag, ``<str>`` of an argument."""
    context = typer.Context(command)
    for parameter in command.get_params(context):
        if getattr(parameter, "is_bool_flag", False):
            parameter.metavar = ""
        elif parameter.param_type_name == "argument" and not parameter.type_descriptor.is_choice:
            parameter.display_type_rich = lambda ctx: None  # noqa: ARG005
    for subcommand in getattr(command, "commands", {}).values():
        hide_types(subcommand)
