"""What classification's metrics are called in files, logs and texts: byte for byte, since other programs read them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs.observability import ray_metrics
from jobs.recipes.document import Recipe, RunSpec
from jobs.recipes.runs import Row
from jobs.recipes.table import Results, write_results
from jobs.run_ops import describe_evaluation
from jobs.train_student import describe
from pipeline.student.evaluation.metrics import Evaluation, metrics_of
from pipeline.student.run import checkpoint
from pipeline.student.run.metrics_files import MetricsFile
from pipeline.student.training.trainer import train
from schemas.config import Config, DataConfig
from schemas.recipe import RecipeConfig
from tests.pipeline.heads import DATA as HEADS_DATA
from tests.pipeline.student.conftest import Replay
from tests.pipeline.student.runs import CE, evaluations, run_config, state_of

METRICS = metrics_of(Config().data)
KEYS = [
    "top1",
    "top5",
    "balanced_accuracy",
    "ece",
    "agreement",
    "kl",
    "teacher_top1",
    "cosine",
    "knn_top1",
    "probe_top1",
]
VALUES = dict(zip(KEYS, [0.5, 0.875, 0.4375, 0.0625, 0.75, 0.25, 0.625, None, None, None], strict=True))


def evaluation(**changes: float | None) -> Evaluation:
    return Evaluation(
        definitions=METRICS.metrics, num_rows=40, metrics={**VALUES, **changes}, per_class={"recall": [0.5, None]}
    )


def test_an_evaluation_is_one_line_of_json_and_a_curve_for_each_measured_metric(tmp_path: Path) -> None:
    with MetricsFile(str(tmp_path), first_step=0, tensorboard=True) as files:
        files.add_evaluation(9, 2, evaluation().measured(), evaluation().tables())
        files.publish_evaluations()
    assert (tmp_path / checkpoint.EVALUATIONS).read_bytes() == (
        b'{"step": 9, "epoch": 2, "num_rows": 40, "top1": 0.5, "top5": 0.875, "balanced_accuracy": 0.4375, '
        b'"ece": 0.0625, "agreement": 0.75, "kl": 0.25, "teacher_top1": 0.625, "cosine": null, '
        b'"knn_top1": null, "probe_top1": null, "per_class": {"recall": [0.5, null]}}\n'
    )
    (events,) = (tmp_path / "tensorboard").iterdir()
    curves = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    assert curves == ["eval/num_rows", *(f"eval/{key}" for key in KEYS[:-3])]


def test_an_evaluation_as_json_and_as_text() -> None:
    assert json.dumps(evaluation(ece=None).as_dict()) == (
        '{"num_rows": 40, "top1": 0.5, "top5": 0.875, "balanced_accuracy": 0.4375, "ece": null, "agreement": 0.75, '
        '"kl": 0.25, "teacher_top1": 0.625, "cosine": null, "knn_top1": null, "probe_top1": null, '
        '"head_trained": true, "per_class": {"recall": [0.5, null]}}'
    )
    assert describe_evaluation(evaluation(ece=None)) == (
        "images                      40\n"
        "top-1                       50.0 %\n"
        "top-5                       87.5 %\n"
        "balanced accuracy           43.8 %\n"
        "calibration error           -\n"
        "agreement with the teacher  75.0 %\n"
        "KL from the teacher         0.2500 nats\n"
        "teacher top-1               62.5 %"
    )


def test_classes_with_names_and_the_lowest_recall_are_a_line() -> None:
    named = replace(evaluation(), class_names={"recall": ["cat", "dog"]})
    assert named.as_dict()["class_names"] == {"recall": ["cat", "dog"]}
    (line,) = (line for line in describe_evaluation(named).splitlines() if line.startswith("lowest recall "))
    # The dog does not occur.
    assert line.split()[2:] == ["cat", "50.0%"]


def test_values_of_heads_with_long_names_are_a_column() -> None:
    definitions = metrics_of(DataConfig.model_validate(HEADS_DATA)).metrics
    measured = Evaluation(definitions=definitions, num_rows=40, metrics={metric.key: None for metric in definitions})
    values = [line.split("  ")[-1].strip() for line in describe_evaluation(measured).splitlines()]
    assert values == ["40", *["-"] * (len(values) - 1)]


def test_the_files_of_a_run_name_these_metrics_in_this_order(replays: Replay, tmp_path: Path) -> None:
    base = replays("crop").config
    summary = train(run_config(base, tmp_path, loss=CE, data={"val_shards": base.data.shards}, train={"epochs": 1}))
    (line,) = evaluations(tmp_path)
    assert [*line] == ["step", "epoch", "num_rows", *KEYS, "per_class"]
    times = {"steps": 5, "epochs": 1, "seconds": summary["seconds"]}
    best = {"best_top1": line["top1"], "best_metric": "top1", "best_value": line["top1"]}
    measured = {key: line[key] for key in ("top1", "top5", "balanced_accuracy", "ece", "knn_top1", "probe_top1")}
    expected = {**times, **measured, **best, "per_class": line["per_class"]}
    assert (tmp_path / checkpoint.SUMMARY).read_text() == json.dumps(expected, indent=2) + "\n"
    state = state_of(tmp_path, checkpoint.BEST)
    assert (state["best_top1"], state["best"]) == (line["top1"], {"metric": "top1", "value": line["top1"]})
    assert describe({**summary, "seconds": 1}, base) == f"5 steps in 1.0 s, top-1 {100 * line['top1']:.2f} %"


def test_ray_has_a_gauge_for_four_metrics() -> None:
    gauges = ray_metrics.evaluation_gauges(METRICS)
    assert {key: (gauge.exported, gauge.text, gauge.tags) for key, gauge in gauges.items()} == {
        "top1": ("ray_stillroom_train_top1", "Accuracy of the last evaluation, 0 to 1.", ("run",)),
        "top5": ("ray_stillroom_train_top5", "Top-5 accuracy of that evaluation, 0 to 1.", ("run",)),
        "balanced_accuracy": (
            "ray_stillroom_train_balanced_accuracy",
            "Balanced accuracy of that evaluation, 0 to 1.",
            ("run",),
        ),
        "agreement": (
            "ray_stillroom_train_agreement",
            "Agreement of student and teacher in that evaluation, 0 to 1.",
            ("run",),
        ),
    }


def test_ray_has_a_gauge_for_each_metric_of_embeddings() -> None:
    gauges = ray_metrics.evaluation_gauges(metrics_of(DataConfig.model_validate({"task": "embedding"})))
    assert {key: (gauge.exported, gauge.tags) for key, gauge in gauges.items()} == {
        key: (f"ray_stillroom_train_{key}", ("run",)) for key in ("cosine", "knn_top1", "probe_top1")
    }


def results_of(folder: Path, teacher: Row | None, **document: Any) -> dict[str, Any]:
    """``results.json`` of one run of the student ``kd``."""
    name = "kd-epochs8-seed1" if "grid" in document else "kd"
    run = RunSpec("kd", 8, 1, Config.model_validate({"run": {"url": str(folder / "students" / name)}}))
    (folder / "students" / name).mkdir(parents=True)
    tree = {"title": "tiny", "out": str(folder), "teacher": {}, "students": {"kd": {}}, **document}
    recipe = Recipe(RecipeConfig.model_validate(tree), folder, Config(), {}, (run,))
    path = write_results(recipe, Results(teacher, ((run, Row(evaluation(), 10.5)),)))
    text = path.read_text()
    assert text == json.dumps(json.loads(text), indent=2) + "\n"
    return json.loads(text)


def test_results_of_a_recipe_have_two_of_these_metrics(tmp_path: Path) -> None:
    teacher = Row(evaluation(top1=0.9375, agreement=None), 99.5)
    single = results_of(tmp_path / "single", teacher)
    assert json.dumps(single) == (
        '{"teacher": {"top1": 0.9375, "seconds": 99.5}, '
        '"students": {"kd": {"top1": 0.5, "agreement": 0.75, "seconds": 10.5}}}'
    )
    # The teacher of a recipe that does not train it is measured with its students.
    grid = results_of(tmp_path / "grid", None, grid={"epochs": [8], "seeds": [1]})
    assert json.dumps(grid) == (
        '{"teacher": {"top1": 0.625, "seconds": null}, '
        '"runs": [{"student": "kd", "epochs": 8, "seed": 1, "top1": 0.5, "agreement": 0.75, "seconds": 10.5}]}'
    )
