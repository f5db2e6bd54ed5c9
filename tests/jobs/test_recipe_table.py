"""Tables of a recipe: means and deviations by hand, published numbers beside measured ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.recipe_cells import Row
from jobs.recipe_file import Cell, Recipe
from jobs.recipe_table import Results, print_tables, spread
from pipeline.student.evaluate import Evaluation
from schemas.config import Config
from schemas.recipe import RecipeConfig


@pytest.mark.parametrize(
    ("values", "digits", "text"),
    [
        # Deviation of two values: their distance over the root of two.
        ([57.4, 58.2], 1, "57.8 ± 0.6"),
        ([1.0, 2.0, 3.0, 4.0], 2, "2.50 ± 1.29"),
        ([12.0], 0, "12"),
        ([], 1, "-"),
    ],
)
def test_a_spread_is_the_mean_and_the_sample_deviation(values: list[float], digits: int, text: str) -> None:
    assert spread(values, digits) == text


def cell(student: str, epochs: int, seed: int) -> Cell:
    url = f"/runs/{student}-epochs{epochs}-seed{seed}"
    return Cell(student, epochs, seed, Config.model_validate({"run": {"url": url}}))


def row(top1: float, *, agreement: float | None = 0.5, seconds: float = 10.0) -> Row:
    found = Evaluation(num_rows=100, top1=top1, top5=1.0, ece=0.1, agreement=agreement, kl=0.2, teacher_top1=0.75)
    return Row(found, seconds)


def printed(results: Results, capsys: pytest.CaptureFixture[str], **document: Any) -> str:
    tree = {"title": "tiny", "out": "out", "teacher": {}, "students": {"kd": {}}, **document}
    cells = tuple(found for found, _ in results.cells)
    recipe = Recipe(RecipeConfig.model_validate(tree), Path("out"), Config(), {}, cells)
    print_tables(recipe, results)
    return capsys.readouterr().out


def test_a_grid_is_a_table_of_students_by_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    cells = (
        *((cell("kd", epochs, seed), row(0.5 + epochs / 100 + seed / 50)) for epochs in (8, 24) for seed in (0, 1)),
        (cell("online", 24, 0), row(0.9, agreement=None, seconds=99.6)),
    )
    lines = [line.split("|") for line in printed(Results(None, cells), capsys).splitlines() if "|" in line]
    rows = [[text.strip() for text in line[1:-1]] for line in lines]
    assert rows[0] == ["top-1, %", "8 epochs", "24 epochs"]
    assert rows[2] == ["kd", "59.0 ± 1.4", "75.0 ± 1.4"]
    assert rows[3] == ["online", "-", "90.0"]
    assert ["online", "-", "-"] in rows
    assert rows[-1] == ["online", "-", "100"]


def test_published_numbers_stand_beside_measured_ones(capsys: pytest.CaptureFixture[str]) -> None:
    results = Results(None, ((cell("kd", 8, 0), row(0.705)),))
    text = printed(results, capsys, published={"kd": 70.66, "teacher": 72.34})
    (teacher,) = [line for line in text.splitlines() if "teacher " in line and "72.34 %" in line]
    (student,) = [line for line in text.splitlines() if "70.66 %" in line]
    assert "75.0 %" in teacher
    assert "70.5 %" in student
