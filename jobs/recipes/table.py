"""What a recipe came to: ``results.json`` and tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from filelock import FileLock
from rich import box
from rich.console import Console
from rich.table import Table

from jobs.observability.log import emit
from jobs.recipes.document import Recipe, RunSpec
from jobs.recipes.runs import Row
from jobs.run_ops import percent
from pipeline import storage
from pipeline.core.errors import ConfigError
from pipeline.core.redaction import quoted

Tree = dict[str, Any]
Entry = dict[str, Any]
"""Numbers of one training, by the names in ``results.json``."""

_RESULTS = "results.json"
_NUMBERS = {"top1", "agreement", "seconds"}


@dataclass(frozen=True, slots=True)
class Results:
    """``teacher`` is None where it was not trained here."""

    teacher: Row | None
    specs: tuple[tuple[RunSpec, Row], ...]

    @property
    def teacher_top1(self) -> float | None:
        """On the validation shards, as a share of 1."""
        return self.specs[0][1].evaluation.teacher_top1 if self.teacher is None else self.teacher.evaluation.top1


def write_results(recipe: Recipe, results: Results) -> Path:
    """``results.json``: top-1, agreement (shares of 1) and seconds of the teacher and each student; of a grid, of each
    cell. Results of earlier runs of the recipe stay, unless their student or its run is gone.

    Raises:
        ConfigError: there is a file of this name that holds no results.
    """
    path = recipe.out / _RESULTS
    recipe.out.mkdir(parents=True, exist_ok=True)
    seconds = None if results.teacher is None else results.teacher.seconds
    teacher = {"top1": results.teacher_top1, "seconds": seconds}
    with FileLock(recipe.out / f".{_RESULTS}.lock"):
        entries = _merged(recipe, read_results(recipe), results)
        tree = {
            "teacher": teacher,
            "students": {entry["student"]: _without(entry, "student") for entry in entries if "seed" not in entry},
            "cells": [entry for entry in entries if "seed" in entry],
        }
        tree = {key: value for key, value in tree.items() if value}
        storage.write(str(path), json.dumps(tree, indent=2).encode() + b"\n")
    return path


def read_results(recipe: Recipe) -> Tree:
    """What ``results.json`` holds; nothing where there is none.

    Raises:
        ConfigError: it holds no results.
    """
    path = recipe.out / _RESULTS
    data = storage.read_if_exists(str(path), max_bytes=storage.MAX_RECORD_BYTES)
    try:
        tree = {} if data is None else json.loads(data)
        is_sound = all(entry.keys() >= _NUMBERS for entry in _entries(tree))
    except (ValueError, AttributeError, TypeError, RecursionError):
        tree, is_sound = {}, False
    if not is_sound:
        aside = f"mv {quoted(str(path))} {quoted(f'{path}.damaged')}"
        raise ConfigError(
            "this file holds no results of a recipe, so others cannot be merged into it",
            code="recipe.results-damaged",
            where=str(path),
            next_step=f"{aside}, and run the recipe again: finished trainings are not repeated",
        )
    return tree


def _entries(tree: Tree) -> list[Entry]:
    """Those of students and of cells; the latter have ``epochs`` and ``seed``."""
    students = [{"student": name, **numbers} for name, numbers in tree.get("students", {}).items()]
    return [*students, *({"epochs": None, **spec} for spec in tree.get("cells", ()))]


def _merged(recipe: Recipe, former: Tree, results: Results) -> list[Entry]:
    """The former entries with the new ones in their places, in the order of the document."""
    by_key = {_key(entry): entry for entry in _entries(former)}
    stored = {key: entry for key, entry in by_key.items() if _is_there(recipe, entry)}
    new = {_key(entry): entry for entry in (_entry(recipe, spec, row) for spec, row in results.specs)}
    gone = len(by_key) - len(stored)
    emit(
        f"results: {len(new)} of this run, {len(stored.keys() - new.keys())} of earlier ones"
        + (f"; {gone} left out: their student or its run is gone" if gone else ""),
        event="stage",
    )
    order = list(recipe.document.students)
    merged = {**stored, **new}
    return [merged[key] for key in sorted(merged, key=lambda key: (order.index(key[0]), *key[1:]))]


def _key(entry: Entry) -> tuple[str, int, int]:
    return entry["student"], entry.get("epochs") or 0, entry.get("seed", -1)


def _is_there(recipe: Recipe, entry: Entry) -> bool:
    """Whether the document still has the student, and the folder of runs the run."""
    student, epochs, seed = _key(entry)
    names = {student} if "seed" not in entry else {f"{student}-epochs{epochs}-seed{seed}", f"{student}-seed{seed}"}
    return student in recipe.document.students and any((recipe.out / "students" / name).is_dir() for name in names)


def _entry(recipe: Recipe, spec: RunSpec, row: Row) -> Entry:
    place = {"epochs": spec.epochs, "seed": spec.seed} if has_grid(recipe) else {}
    found = row.evaluation
    return {
        "student": spec.student,
        **place,
        "top1": found.top1,
        "agreement": found.agreement,
        "seconds": row.seconds,
    }


def _without(entry: Entry, key: str) -> Entry:
    return {name: value for name, value in entry.items() if name != key}


def has_grid(recipe: Recipe) -> bool:
    """Whether the document has lengths or seeds, so that a student may have several cells."""
    document = recipe.document
    return document.grid is not None or any("grid" in stage for stage in document.students.values())


def print_tables(recipe: Recipe, tree: Tree) -> None:
    """What ``results.json`` holds, to standard output."""
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(recipe.document.title, style="bold", highlight=False)
    teacher = tree["teacher"]
    if "students" in tree:
        console.print(_table(teacher, tree["students"], recipe.document.published))
    if "cells" in tree:
        console.print(f"teacher {percent(teacher['top1'])}; mean ± standard deviation over seeds", highlight=False)
        for heading, measure, digits in _MEASURES:
            console.print(_grid_table(heading, tree["cells"], measure, digits))


def _table(teacher: Entry, students: Mapping[str, Entry], published: Mapping[str, float]) -> Table:
    table = Table("")
    for heading in ("top-1", "agreement with teacher", "seconds", *(["published top-1"] if published else [])):
        table.add_column(heading, justify="right")
    for name, entry in {"teacher": teacher, **students}.items():
        seconds = "-" if entry["seconds"] is None else f"{entry['seconds']:.1f}"
        shares = (percent(entry["top1"]), percent(entry.get("agreement")))
        table.add_row(name, *shares, seconds, *_published(name, published))
    return table


def _published(name: str, published: Mapping[str, float]) -> list[str]:
    """A cell of the last column, where there is one."""
    return [f"{published[name]:.2f} %" if name in published else "-"] if published else []


Measure = Callable[[Entry], float | None]
_MEASURES: tuple[tuple[str, Measure, int], ...] = (
    ("top-1, %", lambda entry: _hundredfold(entry["top1"]), 1),
    ("agreement with teacher, %", lambda entry: _hundredfold(entry["agreement"]), 1),
    ("seconds", lambda entry: entry["seconds"], 0),
)


def _hundredfold(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _grid_table(heading: str, specs: Sequence[Entry], measure: Measure, digits: int) -> Table:
    """Students down, epochs across; Markdown, so that it can be pasted."""
    lengths = sorted({spec["epochs"] for spec in specs})
    table = Table(heading, box=box.MARKDOWN)
    for epochs in lengths:
        table.add_column(f"{epochs} epochs", justify="right")
    for student in dict.fromkeys(spec["student"] for spec in specs):
        found = [
            [measure(spec) for spec in specs if (spec["student"], spec["epochs"]) == (student, e)] for e in lengths
        ]
        table.add_row(student, *(spread([value for value in values if value is not None], digits) for values in found))
    return table


def spread(values: Sequence[float], digits: int) -> str:
    """``57.8 ± 0.4``: mean and sample standard deviation; one value has none, and no value is a dash."""
    if not values:
        return "-"
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"
