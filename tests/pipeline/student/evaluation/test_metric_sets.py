"""The metrics of a task reach results, files, texts and the best checkpoint by their declaration alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from jobs.observability import ray_metrics
from jobs.run_ops import describe_evaluation
from jobs.train_student import describe
from pipeline import tasks
from pipeline.student.distributed import DistributedContext
from pipeline.student.evaluation.loaded_run import load_run
from pipeline.student.evaluation.metrics import (
    METRIC_SETS,
    EvaluationScope,
    Metric,
    MetricSet,
    MetricSums,
    Outputs,
    RowMeans,
    Score,
    metrics_of,
)
from pipeline.student.training.trainer import train
from pipeline.tasks.classification import Classification
from schemas.config import Config, DataConfig
from tests.pipeline.student.conftest import Replay
from tests.pipeline.student.evaluation.test_evaluator import CPU, evaluator, network, one_by_one
from tests.pipeline.student.runs import evaluated, evaluations, run_config


class Parity(Classification):
    name = "parity"


class ParitySums(MetricSums):
    def __init__(self, data: DataConfig, scope: EvaluationScope, device: torch.device) -> None:
        assert (data.num_classes, scope.head_trained, device) == (10, True, CPU)
        self._means = RowMeans(["odd", "wrong_parity", "silent"])

    def add(self, student: Outputs, teacher: Outputs | None, targets: tasks.Targets) -> None:
        assert teacher is None
        class_N = student["logits"].argmax(1).numpy()
        self._means.add("odd", int((class_N % 2).sum()), len(class_N))
        self._means.add("wrong_parity", int((class_N % 2 != targets["label"] % 2).sum()), len(class_N))

    def finish(self, distributed: DistributedContext) -> dict[str, float | None]:
        return self._means.over_ranks(distributed)


PARITY = MetricSet(
    metrics=(
        Metric(key="wrong_parity", title="wrong parity", higher_is_better=False, needs=("targets",), gauge="Errors."),
        Metric(key="silent", title="never added", unit="nats"),
        Metric(key="odd", title="odd classes"),
    ),
    selection=("silent", "wrong_parity"),
    table=("odd",),
    sums=ParitySums,
)
tasks.TASKS[Parity.name] = Parity


def expected_metrics(logits_NK: Tensor, label_N: Tensor) -> dict[str, float | None]:
    class_N = logits_NK.argmax(1).tolist()
    wrong = sum(predicted % 2 != label % 2 for predicted, label in zip(class_N, label_N.tolist(), strict=True))
    return {
        "wrong_parity": wrong / len(class_N),
        "silent": None,
        "odd": sum(predicted % 2 for predicted in class_N) / len(class_N),
    }


def test_a_new_task_is_evaluated_by_its_metrics(replays: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRIC_SETS, "parity", lambda _: PARITY)
    config, student = replays("crop").config, network()
    evaluation = evaluator(config, task="parity")(student.module, student.input)
    expected = expected_metrics(*one_by_one(config, student.module.eval(), student.input))
    assert evaluation.as_dict() == {"num_rows": 35, **expected, "head_trained": True}
    assert [*evaluation.metrics] == [*expected]
    lines = describe_evaluation(evaluation).splitlines()
    assert [line[:28].rstrip() for line in lines] == ["images", "wrong parity", "never added", "odd classes"]
    assert lines[2].endswith(" -")


def test_files_of_a_run_and_its_best_checkpoint_follow_the_declaration(
    replays: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METRIC_SETS, "classification", lambda _: PARITY)
    base = replays("crop").config
    keys = {"data": {"val_shards": base.data.shards}, "train": {"epochs": 4, "lr": 0.05}}
    config = run_config(base, tmp_path, **keys)
    summary = train(config)
    lines = evaluations(tmp_path)
    assert [*lines[0]] == ["step", "epoch", "num_rows", "wrong_parity", "silent", "odd"]
    trained = load_run(str(tmp_path), "last").student
    expected = expected_metrics(*one_by_one(config, trained.module, trained.input))
    assert expected.items() <= lines[-1].items()
    assert expected.items() <= summary.items()
    least = min(line["wrong_parity"] for line in lines)
    assert (summary["best_metric"], summary["best_value"], summary["best_silent"]) == ("wrong_parity", least, None)
    assert evaluated(config, "best", with_teacher=False).metrics["wrong_parity"] == least
    assert "wrong parity" in describe(summary, config)
    assert [*ray_metrics.evaluation_gauges(metrics_of(config.data))] == ["wrong_parity"]


def test_a_metric_of_which_less_is_better_improves_downwards() -> None:
    before = Score("wrong_parity", 0.5)
    assert PARITY.is_better(Score("wrong_parity", 0.25), before)
    assert not PARITY.is_better(before, before)
    assert not PARITY.is_better(Score("wrong_parity", 0.75), before)
    # Another metric starts a new comparison.
    assert PARITY.is_better(Score("silent", 9.0), before)
    accuracy = metrics_of(Config().data)
    assert accuracy.is_better(Score("top1", 0.75), Score("top1", 0.5))
    assert not accuracy.is_better(Score("top1", 0.25), Score("top1", 0.5))
