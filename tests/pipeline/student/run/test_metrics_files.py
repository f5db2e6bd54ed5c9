"""Metrics files: each step once, in order, with finite losses."""

from __future__ import annotations

import json
import math
import weakref
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.student.distributed import DistributedContext
from pipeline.student.run.metrics_files import MetricsFile, StepLog
from pipeline.student.training.run_log import ThroughputMeter
from tests.errors import raises


def log_of(losses: list[float], *, first_step: int = 0) -> StepLog:
    log = StepLog(DistributedContext())
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


def test_a_log_does_not_retain_the_graph() -> None:
    log, total = StepLog(DistributedContext()), torch.ones((), requires_grad=True) * 2
    reference = weakref.ref(total)
    log.add(0, 0, 0.1, total, {})
    del total
    assert reference() is None
    assert log.flush()[0]["loss"] == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused_with_its_first_step(bad: float) -> None:
    with raises("train.not-finite-loss", where="first in step 42, seen between steps 40 and 44"):
        log_of([1.0, 1.0, bad, 1.0, bad], first_step=40).flush()


def test_a_record_has_the_gradient_norm_and_the_loss_scale() -> None:
    log = StepLog(DistributedContext())
    log.add(0, 0, 0.1, torch.tensor(0.5), {"kd": torch.tensor(1.0)}, grad_norm=torch.tensor(3.0), scale=1024.0)
    assert log.flush() == [
        {"step": 0, "epoch": 0, "lr": 0.1, "loss": 0.5, "loss/kd": 1.0, "grad_norm": 3.0, "scale": 1024.0}
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_only_gradients_of_a_scaled_loss_may_overflow(bad: float) -> None:
    log = StepLog(DistributedContext())
    log.add(0, 0, 0.1, torch.tensor(0.5), {}, grad_norm=torch.tensor(bad), scale=512.0)
    (record,) = log.flush()
    assert record["grad_norm"] is None
    log.add(1, 0, 0.1, torch.tensor(0.5), {}, grad_norm=torch.tensor(1.0))
    log.add(2, 0, 0.1, torch.tensor(0.5), {}, grad_norm=torch.tensor(bad))
    with raises("train.not-finite-gradients", where="first in step 2, seen between steps 1 and 2"):
        log.flush()


def lines(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def record(*steps: int) -> list[dict[str, float | int]]:
    return [{"step": step, "loss": 1.0} for step in steps]


def test_a_resumed_file_continues_from_the_checkpoints_step(tmp_path: Path) -> None:
    with MetricsFile(str(tmp_path), first_step=0) as file:
        file.add(record(0, 1, 2, 3))
        file.publish()
    with MetricsFile(str(tmp_path), first_step=2) as file:
        file.add(record(2, 3, 4))
        file.publish()
    assert lines(tmp_path) == [0, 1, 2, 3, 4]


def test_a_run_without_a_checkpoint_starts_its_file_again(tmp_path: Path) -> None:
    for _ in range(2):
        with MetricsFile(str(tmp_path), first_step=0) as file:
            file.add(record(0, 1))
            file.publish()
    assert lines(tmp_path) == [0, 1]


def test_records_are_visible_once_published(tmp_path: Path) -> None:
    with MetricsFile(str(tmp_path), first_step=0) as file:
        file.add(record(0))
        file.publish()
        file.add(record(1))
    assert lines(tmp_path) == [0]


def test_speed_and_evaluations_are_resumed_like_the_metrics(tmp_path: Path) -> None:
    for first_step in (0, 2):
        with MetricsFile(str(tmp_path), first_step=first_step) as file:
            for step in range(first_step, 4):
                file.add(record(step), {"images_per_s": 10.0 + first_step, "data_wait": 0.5})
            file.add_evaluation(3, 2, {"top1": 0.5, "ece": None})
            file.publish()
    speed = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert [(line["step"], line["images_per_s"]) for line in speed] == [(0, 10), (1, 10), (2, 12), (3, 12)]
    evaluations = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in evaluations] == [{"step": 3, "epoch": 2, "top1": 0.5, "ece": None}]


def test_tensorboard_reads_one_curve_over_all_starts_of_a_run(tmp_path: Path) -> None:
    """The first start was killed after step 3; its checkpoint is of step 2. TensorBoard's reader is the oracle."""
    for first_step, loss in ((0, 1.0), (2, 2.0)):
        with MetricsFile(str(tmp_path), first_step=first_step, tensorboard=True) as file:
            for step in range(first_step, 4):
                file.add([{"step": step, "epoch": 0, "loss": loss}], {"images_per_s": 10.0})
            file.add_evaluation(3, 1, {"top1": 0.5, "kl": None})
            file.publish()
    names = sorted(path.name for path in (tmp_path / "tensorboard").iterdir())
    assert names == ["events.out.tfevents.0000000000", "events.out.tfevents.0000000002"]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(0, 1), (1, 1), (2, 2), (3, 2)]
    assert [(event.step, event.value) for event in board.Scalars("eval/top1")] == [(3, 0.5)]
    assert set(board.Tags()["scalars"]) == {"epoch", "loss", "images_per_s", "eval/top1"}


def test_tensorboard_has_the_gradient_norms_of_every_measured_step(tmp_path: Path) -> None:
    """Other values are those of the last step since the file was added to."""
    records = [{**record(step)[0], **({"gradient_norm/kd": step + 0.5} if step % 3 == 0 else {})} for step in range(8)]
    with MetricsFile(str(tmp_path), first_step=0, tensorboard=True) as file:
        file.add(records[:5])
        file.add(records[5:])
        file.publish()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("gradient_norm/kd")] == [(0, 0.5), (3, 3.5), (6, 6.5)]
    assert [event.step for event in board.Scalars("loss")] == [4, 7]


def test_a_throughput_meter_counts_images_and_waiting_since_it_was_read() -> None:
    """Each reading of this clock advances it by a second: one to begin, two around each batch, one to read."""
    ticks = count()
    speed = ThroughputMeter(clock=lambda: float(next(ticks)))
    batches = speed.watch(iter([SimpleNamespace(num_rows_global=30), SimpleNamespace(num_rows_global=20)]))
    next(batches)
    next(batches)
    assert speed.read() == {"images_per_s": 10.0, "data_wait": 0.4}
    assert list(batches) == []
    assert speed.read()["images_per_s"] == 0


def test_a_throughput_meter_counts_images_and_their_views() -> None:
    ticks = count()
    speed = ThroughputMeter(4, clock=lambda: float(next(ticks)))
    assert len([*speed.watch(iter([SimpleNamespace(num_rows_global=40)]))]) == 1
    assert speed.read() == {"images_per_s": 2.5, "views_per_s": 10.0, "data_wait": 0.25}
