"""Metrics of the second task, two of each name as for two heads: evaluated, selected, shown and stored as declared."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from jobs.observability import ray_metrics
from jobs.observability.training_observer import TrainingObserver
from jobs.recipes.document import Recipe, RunSpec
from jobs.recipes.runs import Row
from jobs.recipes.table import Results, print_tables, read_results, write_results
from jobs.run_ops import describe_evaluation
from jobs.train_student import describe
from pipeline.core.errors import EvaluationError
from pipeline.models import InputSpec, LoadedModel
from pipeline.shards.writer import pack_shards
from pipeline.student.distributed import DistributedContext
from pipeline.student.evaluation.evaluator import Evaluator, build_evaluator
from pipeline.student.evaluation.metrics import (
    METRIC_SETS,
    Evaluation,
    EvaluationScope,
    Metric,
    MetricSet,
    MetricSums,
    Outputs,
    RowMeans,
    metrics_of,
)
from pipeline.student.run import checkpoint
from pipeline.student.run.metrics_files import MetricsFile
from pipeline.student.training.checkpointer import Progress
from pipeline.tasks import Targets
from pipeline.teacher.inference import Teacher
from schemas.config import Config, DataConfig, ViewsConfig
from schemas.recipe import RecipeConfig
from tests.errors import raises
from tests.pipeline.shards.tars import data_config
from tests.pipeline.tasks.second_task import Point

DATA = data_config(label="point", num_classes=3).model_copy(update={"task": Point.name})
SPEC = InputSpec(size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), interpolation="bilinear")
# Gray levels of images, and the point of each; None: it has none.
LEVELS = [0, 10, 20, 200, 255]
POINTS: list[tuple[int, int] | None] = [(0, 5), (12, 3), None, (190, 200), (255, 250)]
EXACT = {"rel": 1e-6}


class PointSums(MetricSums):
    """Mean errors of the student and of the teacher in each coordinate, and the student's distance from the teacher."""

    def __init__(self, data: DataConfig, scope: EvaluationScope, device: torch.device) -> None:
        assert (data.task, scope.projector, device.type) == ("point", None, "cpu")
        self._means = RowMeans([metric.key for metric in metrics_of(data).metrics])

    def add(self, student: Outputs, teacher: Outputs | None, targets: Targets) -> None:
        has_target_N = torch.from_numpy(targets["y"] != -7)
        for name in ("x", "y"):
            target_N = torch.from_numpy(targets[name])
            for key, outputs in (("error", student), ("teacher_error", teacher)):
                if outputs is not None:
                    error_M = (outputs[name][:, 0] - target_N)[has_target_N].abs()
                    self._means.add(f"{name}/{key}", float(error_M.sum()), len(error_M))
        if teacher is not None:
            distance_N = (student["x"] - teacher["x"]).abs()
            self._means.add("x/distance", float(distance_N.sum()), len(distance_N))

    def finish(self, distributed: DistributedContext) -> dict[str, float | None]:
        return self._means.over_ranks(distributed)


def point_metrics(data: DataConfig) -> MetricSet:
    assert data.label == "point"
    error: dict[str, Any] = {"unit": "none", "higher_is_better": False}
    of_teacher = {**error, "needs": ("targets", "teacher")}
    return MetricSet(
        metrics=(
            *(
                Metric(
                    key=f"{name}/error",
                    title=f"error of {name}",
                    needs=("targets",),
                    teacher_key=f"{name}/teacher_error",
                    gauge="Pixels.",
                    **error,
                )
                for name in ("y", "x")
            ),
            *(
                Metric(key=f"{name}/teacher_error", title=f"teacher's {name}", teacher_outputs=(name,), **of_teacher)
                for name in ("y", "x")
            ),
            Metric(key="x/distance", title="distance", unit="nats", needs=("teacher",), teacher_outputs=("x",)),
        ),
        selection=("y/error", "x/distance"),
        table=("y/error", "x/error"),
        sums=PointSums,
    )


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRIC_SETS, Point.name, point_metrics)


class Brightness(nn.Module):
    """x is the gray level of an image times a gain, and y one more."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        x_B1 = 255 * self.gain * images_BCHW.mean((1, 2, 3))[:, None]
        return {"x": x_B1, "y": x_B1 + 1, "embedding": x_B1.expand(-1, 3)}


def teacher() -> Teacher:
    module: Any = Brightness(gain=2.0)
    return Teacher(LoadedModel(module, SPEC, {}), device=torch.device("cpu"), precision="fp32", batch_size=4)


def gray(level: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (9, 7), (level, level, level)).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture
def evaluator(tmp_path: Path) -> Evaluator:
    samples = []
    for row, (level, point) in enumerate(zip(LEVELS, POINTS, strict=True)):
        members = {"png": gray(level)} if point is None else {"png": gray(level), "point": b"%d,%d" % point}
        samples.append((f"image{row}", members))
    shards = tuple(pack_shards(samples, f"{tmp_path}/points-%d.tar", shard_size=3))
    return build_evaluator(shards, DATA, ViewsConfig(count=1, size=8), DistributedContext(), num_threads=1)


def evaluated(evaluator: Evaluator, *, with_teacher: bool = True) -> Evaluation:
    student: Any = Brightness()
    return evaluator(student, SPEC, teacher() if with_teacher else None)


def test_outputs_and_targets_reach_the_metrics_by_name(evaluator: Evaluator) -> None:
    """Worked out by hand from LEVELS and POINTS, of which four have a target."""
    evaluation = evaluated(evaluator)
    assert evaluation.num_rows == 5
    assert [*evaluation.metrics] == ["y/error", "x/error", "y/teacher_error", "x/teacher_error", "x/distance"]
    assert evaluation.metrics == {
        "x/error": pytest.approx((0 + 2 + 10 + 0) / 4, **EXACT),
        "y/error": pytest.approx((4 + 8 + 1 + 6) / 4, **EXACT),
        "x/teacher_error": pytest.approx((0 + 8 + 210 + 255) / 4, **EXACT),
        "y/teacher_error": pytest.approx((4 + 18 + 201 + 261) / 4, **EXACT),
        "x/distance": pytest.approx((0 + 10 + 20 + 200 + 255) / 5, **EXACT),
    }
    alone = evaluated(evaluator, with_teacher=False).metrics
    assert alone == {key: None if "teacher" in key or "distance" in key else evaluation.metrics[key] for key in alone}


def test_only_the_outputs_that_metrics_read_are_precomputed(evaluator: Evaluator) -> None:
    student: Any = Brightness()
    stored = evaluator.precompute(teacher())
    assert stored.size_bytes == 5 * 2 * 4
    assert evaluator(student, SPEC, stored) == evaluated(evaluator)


@pytest.mark.parametrize("name", ["x", "y", "embedding"])
def test_every_output_must_be_finite(evaluator: Evaluator, name: str) -> None:
    class Broken(Brightness):
        def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
            outputs = super().forward(images_BCHW)
            # Of the two brightest images, which are in the second shard.
            broken = torch.where(outputs["x"] > 100, math.nan, outputs[name])
            return {**outputs, name: broken}

    student: Any = Broken()
    with raises("evaluate.student-not-finite", EvaluationError, got="NaN or infinity in 2 of 2 rows"):
        evaluator(student, SPEC)


def test_keys_with_a_slash_are_curves_and_labels_of_gauges(
    evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = evaluated(evaluator)
    with MetricsFile(str(tmp_path), first_step=0, tensorboard=True) as files:
        files.add_evaluation(9, 2, evaluation.measured(), evaluation.tables())
        files.publish_evaluations()
    (line,) = (tmp_path / checkpoint.EVALUATIONS).read_text().splitlines()
    assert json.loads(line) == {"step": 9, "epoch": 2, **evaluation.measured()}
    (events,) = (tmp_path / "tensorboard").iterdir()
    curves = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    assert curves == [f"eval/{key}" for key in evaluation.measured()]
    gauges = ray_metrics.evaluation_gauges(metrics_of(DATA))
    assert [*gauges] == ["y/error", "x/error"]
    assert {(gauge.exported, gauge.tags) for gauge in gauges.values()} == {
        ("ray_stillroom_train_head_error", ("run", "head"))
    }
    values: list[tuple[float, dict[str, str]]] = []
    monkeypatch.setattr(ray_metrics.Gauge, "set", lambda _, value, **tags: values.append((value, tags)))
    monkeypatch.setenv("STILLROOM_LOG", "json")
    config = Config.model_validate({"run": {"url": str(tmp_path / "run")}}).model_copy(update={"data": DATA})
    with TrainingObserver(config) as observer:
        observer.observe({"kind": "eval", "run": "run", "epoch": 1, **evaluation.measured()})
    assert values == [(evaluation.metrics[f"{name}/error"], {"run": "run", "head": name}) for name in ("y", "x")]
    (event,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert (event["x/error"], event["message"]) == (
        evaluation.metrics["x/error"],
        "train run: epoch 1, error of y 4.7500",
    )


def test_texts_and_the_best_checkpoint_follow_the_declaration(evaluator: Evaluator) -> None:
    evaluation, metrics = evaluated(evaluator, with_teacher=False), metrics_of(DATA)
    assert describe_evaluation(evaluation).splitlines() == [
        "images                      5",
        "head y                      error of y 4.7500",
        "head x                      error of x 3.0000",
    ]
    progress = Progress()
    assert progress.improves({"y/error": 9.0}, metrics)
    assert progress.improves(evaluation.measured(), metrics)
    assert not progress.improves({"y/error": 5.0}, metrics)
    config = Config().model_copy(update={"data": DATA})
    summary = {"steps": 1, "seconds": 2.0, **evaluation.metrics}
    assert describe(summary, config) == "1 steps in 2.0 s, error of y 4.7500"


def test_a_recipe_has_the_metrics_of_its_students_and_a_dash_for_a_teacher_of_another_task(
    evaluator: Evaluator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = {"run": {"url": str(tmp_path / "students" / "near")}}
    run = RunSpec("near", 1, 0, Config.model_validate(tree).model_copy(update={"data": DATA}))
    (tmp_path / "students" / "near").mkdir(parents=True)
    document = {"title": "points", "out": str(tmp_path), "teacher": {}, "students": {"near": {}}}
    recipe = Recipe(
        RecipeConfig.model_validate({**document, "published": {"near": 4.5}}), tmp_path, Config(), {}, (run,)
    )
    classes = metrics_of(Config().data).metrics
    of_classes = Evaluation(definitions=classes, num_rows=5, metrics={metric.key: 0.5 for metric in classes})
    row = Row(evaluated(evaluator), 1.0)
    near = {"y/error": row.evaluation.metrics["y/error"], "x/error": row.evaluation.metrics["x/error"], "seconds": 1.0}
    for trained, expected in (
        (None, {"y/error": pytest.approx(121, **EXACT), "x/error": pytest.approx(118.25, **EXACT), "seconds": None}),
        (Row(of_classes, 2.0), {"y/error": None, "x/error": None, "seconds": 2.0}),
    ):
        write_results(recipe, Results(trained, ((run, row),)))
        assert read_results(recipe) == {"teacher": expected, "students": {"near": near}}
    capsys.readouterr()
    print_tables(recipe, read_results(recipe))
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["teacher", "-", "-", "2.0", "-"] in rows
    assert ["near", "4.7500", "3.0000", "1.0", "4.50"] in rows
