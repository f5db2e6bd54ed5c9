"""The results of a recipe: ``results.json`` and tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich import box
from rich.console import Console
from rich.table import Table

from jobs.observability.log import emit
from jobs.recipes.document import Recipe, RunSpec
from jobs.recipes.images import Entry, Pairs, image_difference, run_names, write_images_of_runs
from jobs.recipes.runs import Row
from pipeline import storage
from pipeline.core.errors import ConfigError
from pipeline.core.redaction import quoted
from pipeline.core.significance import MIN_SEEDS, Comparison, Interval, compare, seed_interval
from pipeline.student.evaluation.metrics import Metric

Tree = dict[str, Any]
_RESULTS = "results.json"
# The key of ``runs`` in files of versions before 0.1.0.
_FORMER_RUNS_KEY = "cells"


@dataclass(frozen=True, slots=True)
class Results:
    """``teacher`` is None if the recipe did not train it."""

    teacher: Row | None
    runs: tuple[tuple[RunSpec, Row], ...]

    def of_teacher(self, metrics: Sequence[Metric]) -> Entry:
        """Those of these metrics that the teacher has, on the validation shards; None for a metric of another task.

        The evaluation of a student has few of a teacher that the recipe did not train.
        """
        if self.teacher is not None:
            values = ((metric, self.teacher.evaluation.value_of(metric)) for metric in metrics)
            return {metric.key: value for metric, value in values if metric.teacher_key or value is not None}
        values = self.runs[0][1].evaluation.metrics
        return {metric.key: values[metric.teacher_key] for metric in metrics if metric.teacher_key}


def write_results(recipe: Recipe, results: Results) -> Path:
    """Writes ``results.json``: the metrics of the table and seconds of the teacher and each run. Earlier results stay,
    unless their student or run was removed. The metrics of each image are written next to it.

    Raises:
        ConfigError: the existing file contains no results.
    """
    path = recipe.out / _RESULTS
    recipe.out.mkdir(parents=True, exist_ok=True)
    seconds = None if results.teacher is None else results.teacher.seconds
    teacher = {**results.of_teacher(recipe.metrics.columns), "seconds": seconds}
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
        images = {run.name: row.evaluation.images for run, row in results.runs}
        write_images_of_runs(recipe.out, {name: table for name, table in images.items() if table is not None})
        storage.write(str(path), json.dumps(tree, indent=2).encode() + b"\n")
    return path


def read_results(recipe: Recipe) -> Tree:
    """The content of ``results.json``; empty if there is no such file. Entries may lack metrics.

    Raises:
        ConfigError: the file contains no results.
    """
    path = recipe.out / _RESULTS
    data = storage.read_if_exists(str(path), max_bytes=storage.MAX_RECORD_BYTES)
    try:
        tree = {} if data is None else json.loads(data)
        if _FORMER_RUNS_KEY in tree:
            tree["runs"] = tree.pop(_FORMER_RUNS_KEY)
        # An earlier version of the document may have had other metrics.
        is_valid = all("seconds" in entry for entry in _entries(tree))
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
    is_stored = any((recipe.out / "students" / name).is_dir() for name in run_names(entry))
    return entry["student"] in recipe.document.students and is_stored


def _entry(recipe: Recipe, run: RunSpec, row: Row) -> Entry:
    grid = {"epochs": run.epochs, "seed": run.seed} if has_grid(recipe) else {}
    values = {metric.key: row.evaluation.value_of(metric) for metric in recipe.metrics.columns}
    return {"student": run.student, **grid, **values, "seconds": row.seconds}


def has_grid(recipe: Recipe) -> bool:
    """Whether a student of the document may have several runs."""
    document = recipe.document
    return document.grid is not None or any("grid" in stage for stage in document.students.values())


def print_tables(recipe: Recipe, tree: Tree) -> None:
    """Prints the content of ``results.json``, and what it shows about differences, to standard output."""
    # Lines of a file are as long as they need to be.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(recipe.document.title, style="bold")
    teacher, columns = tree["teacher"], recipe.metrics.columns
    if "students" in tree:
        console.print(_table(recipe, {"teacher": teacher, **tree["students"]}))
        console.print("students: one training each (n = 1), so no difference between them is resolved")
    if "runs" in tree:
        values = ", ".join(f"{metric.title} {metric.text(teacher.get(metric.key))}" for metric in columns)
        console.print(f"teacher {values}; ±: half of the Student-t 95 % interval of the mean over n seeds")
        for metric in columns:
            scale = metric.scale
            console.print(_grid_table(metric.heading, tree["runs"], metric.key, scale.factor, scale.digits))
        console.print(_grid_table("seconds", tree["runs"], "seconds", 1, 0))
    if "runs" in tree or recipe.document.compared:
        _print_comparisons(recipe, _entries(tree), console)
    console.print("one teacher: no interval contains its variance")


def _print_comparisons(recipe: Recipe, runs: Sequence[Entry], console: Console) -> None:
    if not recipe.document.compared:
        console.print("the recipe names no baseline, so no difference between students is tested")
        return
    for metric in recipe.metrics.columns:
        console.print(_comparison_table(recipe, runs, metric))
    console.print("differences are paired by seed; p is that of the t-test after Holm's correction over the table")
    console.print("distinguished: p < 0.05; no effect: the interval is within the margin of the recipe")
    console.print("over images: the bootstrap interval of the same difference for these runs, over n test images")


def _table(recipe: Recipe, entries: Mapping[str, Entry]) -> Table:
    columns, has_published = recipe.metrics.columns, bool(recipe.document.published)
    headings = [*(metric.title for metric in columns), "seconds"]
    headings += [f"published {recipe.metrics.main.title}"] * has_published
    table = Table("")
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, entry in entries.items():
        seconds = "-" if entry["seconds"] is None else f"{entry['seconds']:.1f}"
        values = (metric.text(entry.get(metric.key)) for metric in columns)
        table.add_row(name, *values, seconds, *[recipe.published(name) or "-"] * has_published)
    return table


def _grid_table(heading: str, runs: Sequence[Entry], key: str, factor: float, digits: int) -> Table:
    """A Markdown table with a row for each student and a column for each number of epochs."""
    lengths = sorted({run["epochs"] for run in runs})
    table = Table(heading, box=box.MARKDOWN)
    for epochs in lengths:
        table.add_column(f"{epochs} epochs", justify="right")
    for student in dict.fromkeys(run["student"] for run in runs):
        by_length = (_by_seed(runs, student, epochs, key).values() for epochs in lengths)
        columns = ([factor * run[key] for run in runs_of] for runs_of in by_length)
        table.add_row(student, *(interval_text(seed_interval(values_S), digits) for values_S in columns))
    return table


def _comparison_table(recipe: Recipe, runs: Sequence[Entry], metric: Metric) -> Table:
    """A Markdown table with a row for each student, baseline and number of epochs."""
    table = Table(metric.heading.replace("%", "points"), box=box.MARKDOWN)
    for heading in ("baseline", "epochs", "difference", "p", "verdict", "over images"):
        table.add_column(heading, justify="right" if heading in ("epochs", "difference") else "left")
    margin, digits = recipe.document.margins.get(metric.key), metric.scale.digits + 1
    rows = _compared_runs(recipe, runs, metric.key)
    differences = [[metric.scale.factor * (a[metric.key] - b[metric.key]) for a, b in pairs] for *_, pairs in rows]
    comparisons = compare(differences, [margin] * len(rows))
    for (student, baseline, epochs, pairs), comparison in zip(rows, comparisons, strict=True):
        over_seeds = interval_text(comparison.difference, digits, sign="+")
        over_images = image_difference(recipe.out, pairs, metric.key, metric.scale.factor)
        bounds = "-" if over_images is None else f"{over_images.low:+.{digits}f} to {over_images.high:+.{digits}f}"
        bounds += "" if over_images is None else f" (n = {over_images.n})"
        names = student, baseline, "-" if epochs is None else str(epochs)
        table.add_row(*names, over_seeds, *_verdict_texts(comparison, margin), bounds)
    return table


def _compared_runs(recipe: Recipe, runs: Sequence[Entry], key: str) -> list[tuple[str, str, int | None, Pairs]]:
    """For each student, baseline and number of epochs that both have, the runs with the same seed."""
    rows: list[tuple[str, str, int | None, Pairs]] = []
    lengths = dict.fromkeys(run.get("epochs") for run in sorted(runs, key=lambda run: run.get("epochs") or 0))
    for student, baseline in recipe.document.compared:
        for epochs in lengths:
            runs_of, others = (_by_seed(runs, name, epochs, key) for name in (student, baseline))
            if runs_of and others:
                pairs = [(run, others[seed]) for seed, run in runs_of.items() if seed in others]
                rows.append((student, baseline, epochs, pairs))
    return rows


def _by_seed(runs: Sequence[Entry], student: str, epochs: int | None, key: str) -> dict[int | None, Entry]:
    """The runs of a student and length in which a metric was measured."""
    chosen = [run for run in runs if (run["student"], run.get("epochs")) == (student, epochs)]
    return {run.get("seed"): run for run in chosen if run.get(key) is not None}


def interval_text(interval: Interval, digits: int, *, sign: str = "") -> str:
    """``57.8 ± 1.2 (n = 3)``; without an interval for one value, a dash for none. ``sign="+"`` is for differences."""
    if not interval.n:
        return "-"
    half_width = f" ± {interval.half_width:.{digits}f}" if interval.n > 1 else ""
    return f"{interval.mean:{sign}.{digits}f}{half_width} (n = {interval.n})"


def _verdict_texts(comparison: Comparison, margin: float | None) -> tuple[str, str]:
    """The cells of p and of the verdict."""
    if comparison.p is None:
        return "-", f"{comparison.verdict}: n < {MIN_SEEDS}"
    p = "< 0.001" if comparison.p < 0.001 else f"{comparison.p:.3f}"
    return p, comparison.verdict + (f" (margin {margin:g})" if comparison.verdict == "no effect" else "")
