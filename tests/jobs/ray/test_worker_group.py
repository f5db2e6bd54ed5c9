"""What a training says and does where its workers have no place."""

from __future__ import annotations

from typing import Any, cast

import pytest
import ray
from ray.exceptions import ActorDiedError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.controller.state import RestartingState, RunningState, SchedulingState
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from ray.util import placement_group, remove_placement_group

from jobs.ray.cluster import room
from jobs.ray.worker_group import Placement
from jobs.train_student import EventActor, _run, train_student
from pipeline.core.errors import ResourceError, TrainingError
from schemas.config import RayConfig
from tests.jobs import NUM_CPUS
from tests.jobs.conftest import Tree, config_of

pytestmark = pytest.mark.ray
LABELS: dict[str, Any] = {"teacher": {"mode": "none"}, "loss": [{"name": "ce"}]}


def test_a_worker_lies_on_one_node() -> None:
    nodes = [{"CPU": 7.0, "GPU": 2.0}, {"CPU": 4.0}, {"CPU": 3.0, "GPU": 4.0, "memory": 1e9}, {}]
    assert room(nodes, {"CPU": 4.0}) == 2
    assert room(nodes, {"CPU": 1.0}) == 14
    assert room(nodes, {"CPU": 2.0, "GPU": 1.0}) == 3
    assert room([], {"CPU": 1.0}) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_workers_whose_place_others_hold_are_given_up_in_the_time_that_was_given(tree: Tree) -> None:
    config = config_of(tree(**LABELS, ray={"address": "local", "num_workers": 2, "wait_s": 1}))
    held = placement_group([{"CPU": NUM_CPUS - 1}])
    ray.get(held.ready())
    try:
        with pytest.raises(ResourceError, match="had no place for 1 s") as caught:
            train_student(config)
    finally:
        remove_placement_group(held)
    assert caught.value.got == "room for 2 where nothing else runs (1 of 2 CPU free)"
    assert caught.value.expected == "room for 2 x 1 CPU"
    assert "ray.num_workers=2" in str(caught.value.where)


@pytest.mark.usefixtures("ray_cluster")
def test_workers_that_have_run_and_find_no_place_again_may_be_started_again_as_they_are() -> None:
    """No bad input (exit code 2), of which a script would make nothing by trying again."""
    said: list[str] = []
    placement = Placement(RayConfig(num_workers=8, min_workers=5, wait_s=1e-6), said.append)
    lost = RestartingState(WorkerGroupError("a node is gone", {0: RuntimeError("gone")}))
    scheduled = SchedulingState(ResizeDecision(num_workers=6, resources_per_worker={"CPU": 1}))
    placement.after_controller_state_update(scheduled, RunningState())
    placement.after_controller_state_update(RunningState(), lost)
    with pytest.raises(TrainingError, match="no place") as caught:
        placement.after_controller_state_update(lost, lost)
    assert caught.value.exit_code == 1
    assert said[0] == "6 of 8 workers run: there is no room for more"
    assert "for room for 5 x 1 CPU; there is room for 2 where nothing else runs" in said[1]
    assert len(said) == 2


class Failing:
    """What of Ray Train its users see where workers die while they start, so many times."""

    def __init__(self, times: int) -> None:
        self.times, self.fits = times, 0

    def fit(self) -> None:
        self.fits += 1
        if self.fits <= self.times:
            raise ControllerError(ActorDiedError())


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_workers_that_die_while_they_start_are_started_anew_as_often_as_others() -> None:
    event_actor = EventActor.remote()
    twice = Failing(2)
    _run(lambda: cast(TorchTrainer, twice), event_actor, max_failures=2)
    assert twice.fits == 3
    with pytest.raises(TrainingError, match="training failed"):
        _run(lambda: cast(TorchTrainer, Failing(2)), event_actor, max_failures=0)


def test_more_workers_at_the_least_than_at_the_most_are_refused() -> None:
    with pytest.raises(ValueError, match="min_workers is 3; wanted at most num_workers, 2"):
        RayConfig(num_workers=2, min_workers=3)
