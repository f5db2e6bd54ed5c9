"""The loss of every step: none lost, none twice, and none that is not a number."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from pipeline.errors import TrainingError
from pipeline.student.metrics import MetricsFile, StepLog
from pipeline.student.world import World


def log_of(losses: list[float], *, first_step: int = 0) -> StepLog:
    log = StepLog(World())
    for step, loss in enumerate(losses, start=first_step):
        log.add(step, step // 5, 0.1, torch.tensor(loss), {"kd": torch.tensor(2 * loss)})
    return log


def test_a_record_holds_step_epoch_lr_total_and_each_term() -> None:
    log = log_of([0.5, 0.25], first_step=5)
    assert len(log) == 2
    assert log.flush() == [
        {"step": 5, "epoch": 1, "lr": 0.1, "loss": 0.5, "loss/kd": 1.0},
        {"step": 6, "epoch": 1, "lr": 0.1, "loss": 0.25, "loss/kd": 0.5},
    ]
    assert len(log) == 0
    assert log.flush() == []


def test_a_log_keeps_no_graph_alive() -> None:
    log = StepLog(World())
    weight = torch.ones((), requires_grad=True)
    log.add(0, 0, 0.1, weight * 2, {})
    assert log.flush()[0]["loss"] == 2
    assert not log._rows


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_told_with_its_step_and_the_range_seen(bad: float) -> None:
    with pytest.raises(TrainingError, match="the loss is not finite") as caught:
        log_of([1.0, 1.0, bad, 1.0, bad], first_step=40).flush()
    assert caught.value.where == "first in step 42, seen between steps 40 and 44"


def lines(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def record(*steps: int) -> list[dict[str, float | int]]:
    return [{"step": step, "loss": 1.0} for step in steps]


def test_a_resumed_file_goes_on_from_the_checkpoints_step(tmp_path: Path) -> None:
    with MetricsFile(str(tmp_path), first_step=0) as file:
        file.add(record(0, 1, 2, 3))
        file.publish()
    with MetricsFile(str(tmp_path), first_step=2) as file:
        file.add(record(2, 3, 4))
        file.publish()
    assert lines(tmp_path) == [0, 1, 2, 3, 4]


def test_a_run_without_a_checkpoint_begins_its_file_anew(tmp_path: Path) -> None:
    for _ in range(2):
        with MetricsFile(str(tmp_path), first_step=0) as file:
            file.add(record(0, 1))
            file.publish()
    assert lines(tmp_path) == [0, 1]


def test_what_is_not_published_is_not_seen(tmp_path: Path) -> None:
    with MetricsFile(str(tmp_path), first_step=0) as file:
        file.add(record(0))
        file.publish()
        file.add(record(1))
    assert lines(tmp_path) == [0]
