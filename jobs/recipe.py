"""A whole experiment from one YAML: train a teacher, cache what it says, train students, print one table.

``python -m jobs.recipe RECIPE [key=value …]``. Every stage is an ordinary config and resumes by itself, so running a
recipe again does only what is missing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from jobs.build_cache import build_cache, describe
from jobs.entry import config_command
from jobs.evaluate import evaluate, percent
from jobs.ray_runtime import cluster
from jobs.train_student import train_student
from pipeline import storage
from pipeline.config import build_config
from pipeline.errors import ConfigError
from pipeline.student.checkpoint import LAST
from pipeline.student.evaluate import Evaluation
from schemas.config import Config

_SECTIONS = {"title", "out", "vars", "common", "teacher", "cache", "students"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """One config a stage. ``{out}/teacher``, ``{out}/cache`` and ``{out}/students/NAME`` hold what they make."""

    title: str
    out: Path
    teacher: Config
    cache: Config
    students: dict[str, Config]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; ``seconds`` of training alone."""

    evaluation: Evaluation
    seconds: float


def load_recipe(source: str, overrides: list[str]) -> Recipe:
    """
    Raises:
        ConfigError: a stage says what no config may say; the stage is named.
    """
    try:
        tree = OmegaConf.create(storage.read(source).decode())
        assert isinstance(tree, DictConfig)
        if "vars" in tree:
            # A mistyped variable would otherwise be a new one that nothing reads.
            OmegaConf.set_struct(tree["vars"], True)
        tree.merge_with_dotlist(overrides)
        plain = OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, AssertionError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError("this recipe cannot be read", where=source, got=str(error)) from error
    assert isinstance(plain, dict)
    unknown = plain.keys() - _SECTIONS
    missing = _SECTIONS - {"vars"} - plain.keys()
    if unknown or missing:
        raise ConfigError(
            "these are not the sections of a recipe",
            where=source,
            got=f"unknown {sorted(unknown)}, missing {sorted(missing)}",
            wanted=", ".join(sorted(_SECTIONS)),
        )
    return _stages(plain, source)


def _stages(tree: dict[str, Any], source: str) -> Recipe:
    out = Path(tree["out"]).absolute()
    run = {"run": {"url": str(out / "teacher")}, "ray": {"address": "none"}}
    teacher = _stage(tree, tree["teacher"], {**run, "teacher": {"mode": "none"}}, f"{source}: teacher")
    said = _as_teacher(teacher, out)
    url = str(out / "cache")
    cache = _stage(tree, tree["cache"], {"teacher": said, "cache": {"url": url}}, f"{source}: cache")
    students = {
        name: _stage(tree, stage, _student_defaults(stage, said, url, out, name), f"{source}: students.{name}")
        for name, stage in tree["students"].items()
    }
    return Recipe(tree["title"], out, teacher, cache, students)


def _as_teacher(config: Config, out: Path) -> dict[str, Any]:
    """The network that the teacher stage trained, as the teacher section of the stages after it."""
    assert config.student is not None
    said = config.student.model_dump(mode="json", exclude_unset=True, exclude={"size"})
    return {**said, "weights": str(out / "teacher" / LAST)}


def _student_defaults(
    stage: Mapping[str, Any], said: dict[str, Any], cache: str, out: Path, name: str
) -> dict[str, Any]:
    mode = stage.get("teacher", {}).get("mode", "cache")
    data = {"cache": cache} if mode == "cache" else {}
    return {"teacher": said, "data": data, "run": {"url": str(out / "students" / name)}}


def _stage(tree: dict[str, Any], stage: Mapping[str, Any], made: dict[str, Any], where: str) -> Config:
    merged = OmegaConf.to_container(OmegaConf.merge(tree["common"], made, dict(stage)))
    assert isinstance(merged, dict)
    return build_config({str(key): value for key, value in merged.items()}, where=where)


def run_recipe(recipe: Recipe) -> dict[str, Row]:
    """Teacher, cache, students; a line of the table for the teacher and for each student."""
    _tell(f"1/3 teacher: {recipe.out / 'teacher'}")
    rows = {"teacher": _train_and_evaluate(recipe.teacher)}
    with cluster(recipe.cache.ray):
        _tell(f"2/3 teacher cache: {recipe.out / 'cache'}")
        _tell(describe(build_cache(recipe.cache)))
        for number, (name, config) in enumerate(recipe.students.items(), start=1):
            _tell(f"3/3 student {number} of {len(recipe.students)}: {name}")
            rows[name] = _train_and_evaluate(config)
    return rows


def _train_and_evaluate(config: Config) -> Row:
    summary = train_student(config)
    assert config.run is not None
    assert config.data.val_shards is not None
    threads = os.cpu_count() or 1
    return Row(evaluate(config.run.url, config.data.val_shards, threads=threads), summary["seconds"])


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def write_results(recipe: Recipe, rows: dict[str, Row]) -> Path:
    """``results.json``: top-1, agreement (shares of 1) and seconds of the teacher and each student."""
    teacher, *_ = rows.values()
    results = {
        "teacher": {"top1": teacher.evaluation.top1, "seconds": teacher.seconds},
        "students": {
            name: {"top1": row.evaluation.top1, "agreement": row.evaluation.agreement, "seconds": row.seconds}
            for name, row in rows.items()
            if name != "teacher"
        },
    }
    path = recipe.out / "results.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    return path


def print_table(title: str, rows: dict[str, Row]) -> None:
    """To standard output."""
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(title, style="bold", highlight=False)
    table = Table("")
    for heading in ("top-1", "agreement with teacher", "seconds"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        table.add_row(name, percent(row.evaluation.top1), percent(row.evaluation.agreement), f"{row.seconds:.1f}")
    console.print(table)


def perform(source: str, overrides: list[str]) -> Path:
    """The whole of it: runs a recipe, prints its table, and returns the path of ``results.json``."""
    recipe = load_recipe(source, overrides)
    rows = run_recipe(recipe)
    path = write_results(recipe, rows)
    print_table(recipe.title, rows)
    return path


def main(source: str, overrides: list[str]) -> None:
    began = time.monotonic()
    path = perform(source, overrides)
    _tell(f"{path} written after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    config_command("recipe", main)
