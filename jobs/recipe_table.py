"""What a recipe came to: ``results.json`` and tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from jobs.evaluate import percent
from jobs.recipe_cells import Row
from jobs.recipe_file import Cell, Recipe


@dataclass(frozen=True, slots=True)
class Results:
    """``teacher`` is None where it was not trained here."""

    teacher: Row | None
    cells: tuple[tuple[Cell, Row], ...]

    @property
    def teacher_top1(self) -> float | None:
        """On the validation shards, as a share of 1."""
        return self.cells[0][1].evaluation.teacher_top1 if self.teacher is None else self.teacher.evaluation.top1


def write_results(recipe: Recipe, results: Results) -> Path:
    """``results.json``: top-1, agreement (shares of 1) and seconds of the teacher and each student; of a grid, of each
    cell.
    """
    seconds = None if results.teacher is None else results.teacher.seconds
    tree: dict[str, Any] = {"teacher": {"top1": results.teacher_top1, "seconds": seconds}}
    if has_grid(recipe):
        tree["cells"] = [
            {"student": cell.student, "epochs": cell.epochs, "seed": cell.seed, **_numbers(row)}
            for cell, row in results.cells
        ]
    else:
        tree["students"] = {cell.student: _numbers(row) for cell, row in results.cells}
    path = recipe.out / "results.json"
    path.write_text(json.dumps(tree, indent=2) + "\n")
    return path


def _numbers(row: Row) -> dict[str, float | None]:
    return {"top1": row.evaluation.top1, "agreement": row.evaluation.agreement, "seconds": row.seconds}


def has_grid(recipe: Recipe) -> bool:
    """Whether a student has more than one cell."""
    return len({cell.student for cell in recipe.cells}) < len(recipe.cells)


def print_tables(recipe: Recipe, results: Results) -> None:
    """To standard output."""
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(recipe.document.title, style="bold", highlight=False)
    if not has_grid(recipe):
        console.print(_table(results, recipe.document.published))
        return
    console.print(f"teacher {percent(results.teacher_top1)}; mean ± standard deviation over seeds", highlight=False)
    for heading, measure, digits in _MEASURES:
        console.print(_grid_table(heading, results.cells, measure, digits))


def _table(results: Results, published: Mapping[str, float]) -> Table:
    table = Table("")
    for heading in ("top-1", "agreement with teacher", "seconds", *(["published top-1"] if published else [])):
        table.add_column(heading, justify="right")
    trained = [] if results.teacher is None else [("teacher", results.teacher)]
    if results.teacher is None:
        table.add_row("teacher", percent(results.teacher_top1), "-", "-", *_published("teacher", published))
    for name, row in [*trained, *((cell.student, row) for cell, row in results.cells)]:
        found = row.evaluation
        shares = (percent(found.top1), percent(found.agreement))
        table.add_row(name, *shares, f"{row.seconds:.1f}", *_published(name, published))
    return table


def _published(name: str, published: Mapping[str, float]) -> list[str]:
    """A cell of the last column, where there is one."""
    return [f"{published[name]:.2f} %" if name in published else "-"] if published else []


Measure = Callable[[Row], float | None]
_MEASURES: tuple[tuple[str, Measure, int], ...] = (
    ("top-1, %", lambda row: _hundredfold(row.evaluation.top1), 1),
    ("agreement with teacher, %", lambda row: _hundredfold(row.evaluation.agreement), 1),
    ("seconds", lambda row: row.seconds, 0),
)


def _hundredfold(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _grid_table(heading: str, cells: Sequence[tuple[Cell, Row]], measure: Measure, digits: int) -> Table:
    """Students down, epochs across; Markdown, so that it can be pasted."""
    lengths = sorted({cell.epochs for cell, _ in cells})
    table = Table(heading, box=box.MARKDOWN)
    for epochs in lengths:
        table.add_column(f"{epochs} epochs", justify="right")
    for student in dict.fromkeys(cell.student for cell, _ in cells):
        found = [[measure(row) for cell, row in cells if (cell.student, cell.epochs) == (student, e)] for e in lengths]
        table.add_row(student, *(spread([value for value in values if value is not None], digits) for values in found))
    return table


def spread(values: Sequence[float], digits: int) -> str:
    """``57.8 ± 0.4``: mean and sample standard deviation; one value has none, and no value is a dash."""
    if not values:
        return "-"
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"
