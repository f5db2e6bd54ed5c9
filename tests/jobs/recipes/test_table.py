"""Tables of a recipe: intervals and differences computed by hand, published and measured numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError
from scipy.stats import bootstrap, ttest_rel

from jobs.recipes.document import Recipe, RunSpec
from jobs.recipes.runs import Row
from jobs.recipes.table import Results, has_grid, interval_text, print_tables, read_results, write_results
from pipeline.core.errors import ConfigError
from pipeline.core.significance import seed_interval
from pipeline.student.evaluation.metrics import Evaluation, metrics_of
from schemas.config import Config
from schemas.recipe import RecipeConfig
from tests.errors import raises


@pytest.mark.parametrize(
    ("values", "digits", "sign", "text"),
    [
        # 12.7062 standard errors; that of two values is half of their distance.
        ([57.4, 58.2], 1, "", "57.8 ± 5.1 (n = 2)"),
        # 4.3027 / √3 deviations.
        ([1.0, 2.0, 3.0], 2, "+", "+2.00 ± 2.48 (n = 3)"),
        ([12.0], 0, "", "12 (n = 1)"),
        ([-1.0], 1, "+", "-1.0 (n = 1)"),
        ([], 1, "", "-"),
    ],
)
def test_an_interval_states_its_mean_half_width_and_number_of_seeds(
    values: list[float], digits: int, sign: str, text: str
) -> None:
    assert interval_text(seed_interval(values), digits, sign=sign) == text


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


def cells(text: str) -> list[list[str]]:
    """The cells of the printed Markdown tables, by line."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]


def test_a_grid_is_a_table_of_students_by_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = (
        *((run_of("kd", epochs, seed), row(0.5 + epochs / 100 + seed / 50)) for epochs in (8, 24) for seed in (0, 1)),
        (run_of("online", 24, 0), row(0.9, agreement=None, seconds=99.6)),
    )
    rows = cells(printed(Results(None, runs), tmp_path, capsys, grid={}))
    assert rows[0] == ["top-1, %", "8 epochs", "24 epochs"]
    assert rows[2] == ["kd", "59.0 ± 12.7 (n = 2)", "75.0 ± 12.7 (n = 2)"]
    assert rows[3] == ["online", "-", "90.0 (n = 1)"]
    assert ["online", "-", "-"] in rows
    assert rows[-1] == ["online", "-", "100 (n = 1)"]


# Top-1 of five seeds in per cent, by student. With seeds 0 to 4, kd is 10 points above ce, kd++ differs from kd by less
# than 0.2 points, and noise has a mean difference of 1.2 points from ce with a half-width of 3.5.
TOP1 = {
    "ce": [60.0, 61.0, 60.5, 59.5, 60.2],
    "kd": [70.1, 71.0, 70.6, 69.4, 70.3],
    "kd++": [70.2, 70.9, 70.7, 69.4, 70.2],
    "noise": [64.0, 60.0, 64.0, 57.0, 62.2],
}


def grid_of(num_seeds: int) -> Results:
    return Results(
        None,
        tuple(
            (run_of(name, 24, seed), row(top1 / 100))
            for name, values in TOP1.items()
            for seed, top1 in enumerate(values[:num_seeds])
        ),
    )


COMPARISON = ["top-1, points", "baseline", "epochs", "difference", "p", "verdict", "over images"]
BASELINES = {"kd": "ce", "kd++": ["kd"], "noise": ["ce"]}


def test_differences_of_students_have_a_paired_interval_and_a_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = {"students": {name: {} for name in TOP1}, "grid": {}, "baseline": BASELINES, "margins": {"top1": 0.5}}
    rows = cells(printed(grid_of(5), tmp_path, capsys, **document))
    first = rows.index(COMPARISON)
    table = rows[first + 2 : first + 5]
    assert [(line[0], line[1], line[2], line[5]) for line in table] == [
        ("kd", "ce", "24", "distinguished"),
        ("kd++", "kd", "24", "no effect (margin 0.5)"),
        ("noise", "ce", "24", "not resolved"),
    ]
    # Differences by hand: 10.1, 10, 10.1, 9.9, 10.1 and 0.1, −0.1, 0.1, 0, −0.1; t for 4 degrees of freedom is 2.7764.
    assert table[0][3:5] == ["+10.04 ± 0.11 (n = 5)", "< 0.001"]
    assert table[1][3:5] == ["+0.00 ± 0.12 (n = 5)", "1.000"]
    # Differences 4, −1, 3.5, −2.5, 2. Their p is the second smallest of three.
    assert table[2][3] == "+1.20 ± 3.53 (n = 5)"
    corrected = 2 * ttest_rel(TOP1["noise"], TOP1["ce"]).pvalue
    assert float(table[2][4]) == pytest.approx(corrected, abs=0.0005)


def evaluated_images(hits: Sequence[float | None], shard: str = "val-00") -> pa.Table:
    samples = [f"image{number}" for number in range(len(hits))]
    return pa.table({"shard": [shard] * len(hits), "sample": samples, "top1": pa.array(hits, pa.float64())})


def with_images(run: RunSpec, hits: Sequence[float | None], **images: Any) -> tuple[RunSpec, Row]:
    counted = [hit for hit in hits if hit is not None]
    measured = row(sum(counted) / len(counted))
    return run, replace(measured, evaluation=replace(measured.evaluation, images=evaluated_images(hits, **images)))


def images_column(text: str) -> list[str]:
    """Of the comparisons in top-1."""
    rows = cells(text)
    lines = rows[rows.index(COMPARISON) + 2 :]
    return [line[6] for line in takewhile(lambda line: len(line) == 7 and line[0] != AGREEMENT, lines)]


AGREEMENT = "agreement with the teacher, points"


def test_a_difference_has_an_interval_over_images_of_its_mean_over_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    hits = {
        (name, seed): (random.random(500) < share) for name, share in (("kd", 0.7), ("online", 0.6)) for seed in (0, 1)
    }
    runs = tuple(with_images(run_of(name, 8, seed), values.astype(float)) for (name, seed), values in hits.items())
    text = printed(Results(None, runs), tmp_path, capsys, grid={}, baseline={"kd": "online"})
    difference_N = np.mean([hits["kd", seed].astype(float) - hits["online", seed] for seed in (0, 1)], axis=0)
    expected = bootstrap((100 * difference_N,), np.mean, method="percentile", rng=np.random.default_rng(1))
    (cell,) = images_column(text)
    low, to, high, *count = cell.split()
    assert (to, " ".join(count)) == ("to", "(n = 500)")
    # The bounds of two bootstraps with 10,000 samples; the interval is about 8 points wide.
    assert (float(low), float(high)) == pytest.approx(tuple(expected.confidence_interval), abs=0.3)


def test_images_that_do_not_count_for_a_metric_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Without a grid, the folder of a run has the name of its student.
    kd, online = (
        RunSpec(name, 8, 0, Config.model_validate({"run": {"url": f"/runs/{name}"}})) for name in ("kd", "online")
    )
    runs = (with_images(kd, [1, None, 1]), with_images(online, [0, None, 0]))
    text = printed(Results(None, runs), tmp_path, capsys, baseline={"kd": "online"})
    assert images_column(text) == ["+100.00 to +100.00 (n = 2)"]
    assert "+100.00 (n = 1)" in text


def test_without_the_same_stored_images_a_difference_has_no_interval_over_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kd = with_images(run_of("kd", 8, 0), [1, 0])
    others = (
        (run_of("online", 8, 0), row(0.5)),
        with_images(run_of("online", 8, 0), [0, 1], shard="other"),
        with_images(run_of("online", 8, 0), [0, 1, 1]),
    )
    for number, other in enumerate(others):
        text = printed(Results(None, (kd, other)), tmp_path / str(number), capsys, grid={}, baseline={"kd": "online"})
        assert images_column(text) == ["-"]


def test_images_of_an_earlier_run_of_the_recipe_are_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(recipe_of(tmp_path, grid={}), Results(None, (with_images(run_of("online", 8, 0), [0, 1, 0]),)))
    results = Results(None, (with_images(run_of("kd", 8, 0), [1, 1, 1]),))
    text = printed(results, tmp_path, capsys, grid={}, baseline={"kd": "online"})
    assert images_column(text)[0].endswith("(n = 3)")


def test_a_damaged_file_of_images_is_reported(tmp_path: Path) -> None:
    runs = tuple(with_images(run_of(name, 8, 0), [1, 0]) for name in ("kd", "online"))
    recipe = recipe_of(tmp_path, grid={}, baseline="kd")
    write(recipe, Results(None, runs))
    path = tmp_path / "images" / "online-epochs8-seed0.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with raises("recipe.results-damaged", ConfigError, where=str(path)):
        print_tables(recipe, read_results(recipe))


def test_only_runs_of_equal_length_and_seed_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = (
        *((run_of("kd", 8, seed), row(0.5)) for seed in (0, 1, 2)),
        *((run_of("online", 8, seed), row(0.6)) for seed in (1, 2, 3)),
        (run_of("online", 24, 0), row(0.9)),
    )
    rows = cells(printed(Results(None, runs), tmp_path, capsys, grid={}, baseline="kd"))
    first = rows.index(COMPARISON)
    assert rows[first + 2][:4] == ["online", "kd", "8", "+10.00 ± 0.00 (n = 2)"]
    assert rows[first + 3][0].startswith("agreement")


def test_two_seeds_get_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = {"students": {name: {} for name in TOP1}, "grid": {}, "baseline": "ce", "margins": {"top1": 50}}
    text = printed(grid_of(2), tmp_path, capsys, **document)
    verdicts = [line[5] for line in cells(text) if len(line) == 7 and line[1] == "ce"]
    assert set(verdicts) == {"not resolved: n < 3"}
    # Three students, for top-1 and agreement.
    assert len(verdicts) == 6


def test_a_table_states_what_its_intervals_lack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    students = {name: {} for name in TOP1}
    for number, results in enumerate((grid_of(3), Results(None, ((run_of("kd", 8, 0), row(0.7)),)))):
        grid = {} if number == 0 else None
        text = printed(results, tmp_path / str(number), capsys, students=students, grid=grid)
        assert "one teacher: no interval contains its variance" in text
        assert ("no baseline" in text) == (number == 0)
        assert ("(n = 1)" in text) == (number == 1)
        assert "distinguished" not in text


@pytest.mark.parametrize(
    ("document", "key"),
    [
        ({"baseline": "labels"}, "labels"),
        ({"baseline": {"labels": "kd"}}, "labels"),
        ({"baseline": {"kd": ["online", "labels"]}}, "labels"),
        ({"baseline": {"kd": "kd"}}, "itself"),
        ({"margins": {"top1": 0}}, "margins.top1"),
    ],
)
def test_a_baseline_is_another_student_and_a_margin_positive(document: dict[str, Any], key: str) -> None:
    tree = {"title": "tiny", "out": "/out", "teacher": {}, "students": {"kd": {}, "online": {}}, **document}
    with pytest.raises(ValidationError, match=key):
        RecipeConfig.model_validate(tree)


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


HEADS = {"task": "heads", "label": "json", "heads": {"pair": {"num_classes": 4}, "even": {"num_classes": 2}}}


def heads_row(config: Config, **values: float) -> Row:
    metrics = metrics_of(config.data).metrics
    measured = dict.fromkeys((metric.key for metric in metrics), None)
    return Row(Evaluation(definitions=metrics, num_rows=100, metrics={**measured, **values}), 1.0)


def test_a_recipe_chooses_the_columns_of_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config.model_validate({"data": HEADS})
    runs: list[tuple[RunSpec, Row]] = []
    for name, offset in (("kd", 0.1), ("online", 0.0)):
        for seed, value in enumerate((0.5, 0.52, 0.54)):
            values = {"pair/balanced_accuracy": value + offset, "pair/teacher_top1": 0.75, "even/top1": 0.9}
            run = replace(
                run_of(name, 8, seed), config=config.model_copy(update={"run": run_of(name, 8, seed).config.run})
            )
            runs.append((run, heads_row(config, **values)))
    document = {"metrics": ["pair/balanced_accuracy", "even/top1"], "margins": {"even/top1": 1}}
    results = Results(None, tuple(runs))
    rows = cells(printed(results, tmp_path, capsys, grid={}, baseline="online", **document))
    assert [line[0] for line in rows if line[0].endswith((", %", ", points"))] == [
        "balanced accuracy (pair), %",
        "top-1 (even), %",
        "balanced accuracy (pair), points",
        "top-1 (even), points",
    ]
    # 2 points between neighbours: 4.3027 · 2 / √3.
    assert ["kd", "62.0 ± 5.0 (n = 3)"] in rows
    assert [(line[3], line[5]) for line in rows if line[1:2] == ["online"]] == [
        ("+10.00 ± 0.00 (n = 3)", "distinguished"),
        ("+0.00 ± 0.00 (n = 3)", "no effect (margin 1)"),
    ]


def test_results_without_a_metric_that_the_recipe_has_now_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(recipe_of(tmp_path), Results(None, ((run_of("online", 1, 0), row(0.5)),)))
    recipe = recipe_of(tmp_path, metrics=["ece"])
    tree = write(recipe, Results(None, ((run_of("kd", 1, 0), row(0.6)),)))
    assert (tree["students"]["kd"]["ece"], tree["students"]["online"]["top1"]) == (0.1, 0.5)
    print_tables(recipe, read_results(recipe))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "online" in line]
    assert [cell.strip() for cell in line.split("│")[1:-1]] == ["online", "-", "10.0"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"students": {"kd": {"top1": 1}}}', '{"runs": [3]}'])
def test_a_damaged_file_of_results_is_reported_and_not_changed(text: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    for call in (read_results, lambda recipe: write_results(recipe, Results(row(0.5), ()))):
        with raises("recipe.results-damaged", ConfigError, where=str(tmp_path / "results.json")):
            call(recipe_of(tmp_path))
    assert (tmp_path / "results.json").read_text() == text
