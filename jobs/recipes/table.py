"""The results of a recipe: ``results.json`` and tables."""

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
"""The numbers of one run, by their names in ``results.json``; runs of a grid also have ``epochs`` and ``seed``."""

_RESULTS = "results.json"
# The key of ``runs`` in files of versions before 0.1.0.
_FORMER_RUNS_KEY = "cells"
_REQUIRED_KEYS = {"top1", "agreement", "seconds"}


@dataclass(frozen=True, slots=True)
class Results:
    """``teacher`` is None if the recipe did not train it."""

    teacher: Row | None
    runs: tuple[tuple[RunSpec, Row], ...]

    @property
    def teacher_top1(self) -> float | None:
        """On the validation shards, from 0 to 1."""
        return self.runs[0][1].evaluation.teacher_top1 if self.teacher is None else self.teacher.evaluation.top1


def write_results(recipe: Recipe, results: Results) -> Path:
    """Writes ``results.json``: top-1 and agreement (from 0 to 1) and seconds of the teacher and each run. Earlier
    results stay, unless their student or run was removed.

    Raises:
        ConfigError: the existing file contains no results.
    """
    path = recipe.out / _RESULTS
    recipe.out.mkdir(parents=True, exist_ok=True)
    seconds = None if results.teacher is None else results.teacher.seconds
    teacher = {"top1": results.teacher_top1, "seconds": seconds}
    with FileLock(recipe.out / f".{_RESULTS}.lock"):
        entries = _merged(recipe, read_results(recipe), results)
        tree = {
            "teacher": teacher,
            "students": {
                entry["student"]: {name: value for name, value in entry.items() if name != "student"}
                for entry in entries
                if "seed" not in entry
            },
            "runs": [entry for entry in entries if "seed" in entry],
        }
        tree = {key: value for key, value in tree.items() if value}
        storage.write(str(path), json.dumps(tree, indent=2).encode() + b"\n")
    return path


def read_results(recipe: Recipe) -> Tree:
    """The content of ``results.json``; empty if there is no such file.

    Raises:
        ConfigError: the file contains no results.
    """
    path = recipe.out / _RESULTS
    data = storage.read_if_exists(str(path), max_bytes=storage.MAX_RECORD_BYTES)
    try:
        tree = {} if data is None else json.loads(data)
        if _FORMER_RUNS_KEY in tree:
            tree["runs"] = tree.pop(_FORMER_RUNS_KEY)
        is_valid = all(entry.keys() >= _REQUIRED_KEYS for entry in _entries(tree))
    except (ValueError, AttributeError, TypeError, RecursionError):
        tree, is_valid = {}, False
    if not is_valid:
        move = f"mv {quoted(str(path))} {quoted(f'{path}.damaged')}"
        raise ConfigError(
            "this file contains no results of a recipe, so new results cannot be merged into it",
            code="recipe.results-damaged",
            where=str(path),
            next_step=f"{move}, and run the recipe again: finished trainings are not repeated",
        )
    return tree


def _entries(tree: Tree) -> list[Entry]:
    students = [{"student": name, **numbers} for name, numbers in tree.get("students", {}).items()]
    return [*students, *({"epochs": None, **entry} for entry in tree.get("runs", ()))]


def _merged(recipe: Recipe, earlier: Tree, results: Results) -> list[Entry]:
    """The earlier entries, updated by the new ones, in the order of the document."""
    by_key = {_key(entry): entry for entry in _entries(earlier)}
    stored = {key: entry for key, entry in by_key.items() if _exists(recipe, entry)}
    new = {_key(entry): entry for entry in (_entry(recipe, run, row) for run, row in results.runs)}
    num_removed = len(by_key) - len(stored)
    emit(
        f"results: {len(new)} of this run, {len(stored.keys() - new.keys())} of earlier ones"
        + (f"; {num_removed} left out: their student or run was removed" if num_removed else ""),
        event="stage",
    )
    order = list(recipe.document.students)
    merged = {**stored, **new}
    return [merged[key] for key in sorted(merged, key=lambda key: (order.index(key[0]), *key[1:]))]


def _key(entry: Entry) -> tuple[str, int, int]:
    return entry["student"], entry.get("epochs") or 0, entry.get("seed", -1)


def _exists(recipe: Recipe, entry: Entry) -> bool:
    """Whether the document has the student, and the folder of the run exists."""
    student, epochs, seed = _key(entry)
    names = {student} if "seed" not in entry else {f"{student}-epochs{epochs}-seed{seed}", f"{student}-seed{seed}"}
    return student in recipe.document.students and any((recipe.out / "students" / name).is_dir() for name in names)


def _entry(recipe: Recipe, run: RunSpec, row: Row) -> Entry:
    grid = {"epochs": run.epochs, "seed": run.seed} if has_grid(recipe) else {}
    numbers = {"top1": row.evaluation.top1, "agreement": row.evaluation.agreement, "seconds": row.seconds}
    return {"student": run.student, **grid, **numbers}


def has_grid(recipe: Recipe) -> bool:
    """Whether a student of the document may have several runs."""
    document = recipe.document
    return document.grid is not None or any("grid" in stage for stage in document.students.values())


def print_tables(recipe: Recipe, tree: Tree) -> None:
    """Prints the content of ``results.json`` to standard output."""
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(recipe.document.title, style="bold", highlight=False)
    teacher = tree["teacher"]
    if "students" in tree:
        console.print(_table(teacher, tree["students"], recipe.document.published))
    if "runs" in tree:
        console.print(f"teacher {percent(teacher['top1'])}; mean ± standard deviation over seeds", highlight=False)
        for heading, measure, digits in _MEASURES:
            console.print(_grid_table(heading, tree["runs"], measure, digits))


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
    """The cell of the last column, if there is such a column."""
    return [f"{published[name]:.2f} %" if name in published else "-"] if published else []


Measure = Callable[[Entry], float | None]
_MEASURES: tuple[tuple[str, Measure, int], ...] = (
    ("top-1, %", lambda entry: _in_percent(entry["top1"]), 1),
    ("agreement with teacher, %", lambda entry: _in_percent(entry["agreement"]), 1),
    ("seconds", lambda entry: entry["seconds"], 0),
)


def _in_percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _grid_table(heading: str, runs: Sequence[Entry], measure: Measure, digits: int) -> Table:
    """A Markdown table with a row for each student and a column for each number of epochs."""
    lengths = sorted({run["epochs"] for run in runs})
    table = Table(heading, box=box.MARKDOWN)
    for epochs in lengths:
        table.add_column(f"{epochs} epochs", justify="right")
    for student in dict.fromkeys(run["student"] for run in runs):
        columns = [[measure(run) for run in runs if (run["student"], run["epochs"]) == (student, e)] for e in lengths]
        table.add_row(
            student, *(spread([value for value in column if value is not None], digits) for column in columns)
        )
    return table


def spread(values: Sequence[float], digits: int) -> str:
    """``57.8 ± 0.4``: mean and sample standard deviation; the mean alone of one value, a dash for none."""
    if not values:
        return "-"
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"
