"""A training of two starts: its log, and its sums computed by hand."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.observability.training_observer import TrainingObserver
from tests.jobs.conftest import JsonLog, Tree, config_of
from tests.jobs.observability.test_build_observer import Clock


def step(number: int, *, images_per_s: float, data_wait: float) -> dict[str, Any]:
    speed = {"images_per_s": images_per_s, "data_wait": data_wait}
    return {"kind": "step", "run": "r", "step": number, "epoch": 0, "lr": 0.1, "loss": 2.5, **speed}


def rank(number: int, world_size: int, node: str) -> dict[str, Any]:
    return {"kind": "rank", "rank": number, "world_size": world_size, "node": node}


def begin(first_step: int) -> dict[str, Any]:
    return {"kind": "begin", "run": "r", "first_step": first_step, "total_steps": 40, "steps_per_epoch": 40}


@pytest.fixture
def events(tree: Tree, json_log: JsonLog) -> list[dict[str, Any]]:
    """Three ranks, one lost after step 19 of 40; two resume from step 10. 24 images a step."""
    clock = Clock()
    config = config_of(tree(ray={"cpus_per_worker": 2, "use_gpu": True, "num_workers": 3}))
    with TrainingObserver(config, clock=clock) as observer:
        clock.now_s += 100
        for number, node in enumerate(("left", "left", "right")):
            observer.observe(rank(number, 3, node))
        observer.observe(begin(0))
        observer.observe(step(19, images_per_s=48, data_wait=0.5))
        clock.now_s += 1200
        for number, node in enumerate(("left", "right")):
            observer.observe(rank(number, 2, node))
        observer.observe(begin(10))
        observer.observe(step(39, images_per_s=24, data_wait=0.0))
        observer.observe({"kind": "eval", "run": "r", "epoch": 1, "top1": 0.25, "top5": None, "agreement": None})
        clock.now_s += 1800
    return json_log()


def test_a_recovery_is_logged_with_the_step_it_resumes_from(events: list[dict[str, Any]]) -> None:
    starts = [(item["level"], item["attempt"], item["first_step"]) for item in events if item["event"] == "begin"]
    assert starts == [("debug", 1, 0), ("warning", 2, 10)]


def test_the_sums_are_over_all_starts(events: list[dict[str, Any]]) -> None:
    (summary,) = (item for item in events if item["event"] == "summary")
    assert (summary["nodes"], summary["starts"]) == (2, 2)
    # Both starts did steps 10 to 19.
    assert summary["repeated_steps"] == 10
    assert "2 starts (10 steps repeated), " in summary["message"]
    # 20 steps in 10 s, half of it waiting, then 30 steps in 30 s: 1,200 images in 40 s.
    assert summary["images_per_s"] == 30.0
    assert summary["data_wait"] == 5 / 40
    # Three workers for 20 minutes, two for half an hour, with two CPUs and a GPU each.
    assert (summary["worker_hours"], summary["cpu_hours"], summary["gpu_hours"]) == (2.0, 4.0, 2.0)


def test_nodes_have_their_ranks_and_their_share_of_the_speed(events: list[dict[str, Any]]) -> None:
    nodes = [(item["node"], item["ranks"], item["images_per_s"]) for item in events if item["event"] == "node"]
    assert nodes == [("left", 1, 15.0), ("right", 1, 15.0)]


def test_progress_goes_back_with_the_training_and_reaches_its_end(events: list[dict[str, Any]]) -> None:
    (last,) = (item for item in events if item["event"] == "progress")
    assert (last["done"], last["total"]) == (40, 40)
    (evaluation,) = (item for item in events if item["event"] == "eval")
    assert (evaluation["top1"], evaluation["message"]) == (0.25, "train run: epoch 1, top-1 25.00 %")


def test_a_training_that_never_began_logs_no_summary(tree: Tree, capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingObserver(config_of(tree())):
        pass
    assert capsys.readouterr().err == ""
