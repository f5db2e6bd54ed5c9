"""Tables of a recipe: means and deviations computed by hand, published and measured numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.recipes.document import Recipe, RunSpec
from jobs.recipes.runs import Row
from jobs.recipes.table import Results, has_grid, print_tables, read_results, spread, write_results
from pipeline.core.errors import ConfigError
from pipeline.student.evaluation.metrics import Evaluation, metrics_of
from schemas.config import Config
from schemas.recipe import RecipeConfig
from tests.errors import raises


@pytest.mark.parametrize(
    ("values", "digits", "text"),
    [
        # The deviation of two values is their distance over the square root of two.
        ([57.4, 58.2], 1, "57.8 ± 0.6"),
        ([1.0, 2.0, 3.0, 4.0], 2, "2.50 ± 1.29"),
        ([12.0], 0, "12"),
        ([], 1, "-"),
    ],
)
def test_a_spread_is_the_mean_and_the_sample_deviation(values: list[float], digits: int, text: str) -> None:
    assert spread(values, digits) == text


def run_of(student: str, epochs: int, seed: int) -> RunSpec:
    url = f"/runs/{student}-epochs{epochs}-seed{seed}"
    return RunSpec(student, epochs, seed, Config.model_validate({"run": {"url": url}}))


def row(top1: float, *, agreement: float | None = 0.5, seconds: float = 10.0) -> Row:
    values = {"top1": top1, "top5": 1.0, "ece": 0.1, "agreement": agreement, "kl": 0.2, "teacher_top1": 0.75}
    return Row(Evaluation(definitions=metrics_of(Config().data).metrics, num_rows=100, metrics=values), seconds)


def recipe_of(out: Path, *runs: RunSpec, **document: Any) -> Recipe:
    tree = {"title": "tiny", "out": str(out), "teacher": {}, "students": {"kd": {}, "online": {}}, **document}
    return Recipe(RecipeConfig.model_validate(tree), out, Config(), {}, runs)


def write(recipe: Recipe, results: Results) -> dict[str, Any]:
    """The content of the file after these runs, whose folders exist."""
    for run, _ in results.runs:
        name = run.name if has_grid(recipe) else run.student
        (recipe.out / "students" / name).mkdir(parents=True, exist_ok=True)
    return json.loads(write_results(recipe, results).read_text())


def printed(results: Results, out: Path, capsys: pytest.CaptureFixture[str], **document: Any) -> str:
    recipe = recipe_of(out, *(run for run, _ in results.runs), **document)
    write(recipe, results)
    print_tables(recipe, read_results(recipe))
    return capsys.readouterr().out


def test_a_grid_is_a_table_of_students_by_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = (
        *((run_of("kd", epochs, seed), row(0.5 + epochs / 100 + seed / 50)) for epochs in (8, 24) for seed in (0, 1)),
        (run_of("online", 24, 0), row(0.9, agreement=None, seconds=99.6)),
    )
    lines = [
        line.split("|") for line in printed(Results(None, runs), tmp_path, capsys, grid={}).splitlines() if "|" in line
    ]
    rows = [[text.strip() for text in line[1:-1]] for line in lines]
    assert rows[0] == ["top-1, %", "8 epochs", "24 epochs"]
    assert rows[2] == ["kd", "59.0 ± 1.4", "75.0 ± 1.4"]
    assert rows[3] == ["online", "-", "90.0"]
    assert ["online", "-", "-"] in rows
    assert rows[-1] == ["online", "-", "100"]


def test_published_numbers_have_a_column_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results(None, ((run_of("kd", 8, 0), row(0.705)),))
    text = printed(results, tmp_path, capsys, published={"kd": 70.66, "teacher": 72.34})
    (teacher,) = [line for line in text.splitlines() if "teacher " in line and "72.34 %" in line]
    (student,) = [line for line in text.splitlines() if "70.66 %" in line]
    assert "75.0 %" in teacher
    assert "70.5 %" in student


def test_a_partial_run_merges_into_the_results_of_earlier_ones(tmp_path: Path) -> None:
    runs = tuple((run_of("kd", epochs, 0), row(epochs / 100)) for epochs in (8, 24))
    recipe = recipe_of(tmp_path, grid={"epochs": [8, 24]})
    before = write(recipe, Results(row(0.7), runs))["runs"]
    after = write(recipe, Results(row(0.7), ((run_of("online", 8, 0), row(0.5)), (run_of("kd", 24, 0), row(0.9)))))
    assert set(after) == {"teacher", "runs"}
    assert [(entry["student"], entry["epochs"], entry["top1"]) for entry in after["runs"]] == [
        ("kd", 8, 0.08),
        ("kd", 24, 0.9),
        ("online", 8, 0.5),
    ]
    assert after["runs"][0] == before[0]


def test_results_of_earlier_versions_are_read(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, grid={"epochs": [8, 24]})
    tree = write(recipe, Results(row(0.7), ((run_of("kd", 8, 0), row(0.5)),)))
    (tmp_path / "results.json").write_text(json.dumps({"teacher": tree["teacher"], "cells": tree["runs"]}))
    assert read_results(recipe) == tree


def test_students_without_a_grid_merge_by_name(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    write(recipe, Results(None, ((run_of("online", 1, 0), row(0.5)),)))
    tree = write(recipe, Results(None, ((run_of("kd", 1, 0), row(0.6)),)))
    assert [(name, entry["top1"]) for name, entry in tree["students"].items()] == [("kd", 0.6), ("online", 0.5)]


def test_results_without_their_student_or_run_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = Results(None, tuple((run_of(name, 8, 0), row(0.5)) for name in ("kd", "online")))
    write(recipe_of(tmp_path, grid={}), both)
    shutil.rmtree(tmp_path / "students" / "online-epochs8-seed0")
    capsys.readouterr()
    tree = write(recipe_of(tmp_path, grid={}), Results(None, ((run_of("kd", 24, 0), row(0.5)),)))
    assert [(entry["student"], entry["epochs"]) for entry in tree["runs"]] == [("kd", 8), ("kd", 24)]
    assert "results: 1 of this run, 1 of earlier ones; 1 left out" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "{", '{"students": {"kd": {"top1": 1}}}', '{"runs": [3]}'])
def test_a_damaged_file_of_results_is_reported_and_not_changed(text: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    for call in (read_results, lambda recipe: write_results(recipe, Results(row(0.5), ()))):
        with raises("recipe.results-damaged", ConfigError, where=str(tmp_path / "results.json")):
            call(recipe_of(tmp_path))
    assert (tmp_path / "results.json").read_text() == text
