"""The workers of a training: placement, warnings while they wait, and restarts."""

from __future__ import annotations

from typing import Any, cast

import pytest
import ray
from ray.exceptions import ActorDiedError
from ray.train import ControllerError
from ray.train.torch import TorchTrainer
from ray.util import placement_group, remove_placement_group

from jobs.ray.cluster import num_fitting
from jobs.ray.worker_group import PlacementMonitor
from jobs.train_student import EventActor, fit_with_restarts, train_student
from pipeline.core.errors import ResourceError, TrainingError
from schemas.config import RayConfig
from tests.errors import raises
from tests.jobs import NUM_CPUS
from tests.jobs.conftest import Tree, config_of

pytestmark = pytest.mark.ray
LABELS: dict[str, Any] = {"teacher": {"mode": "none"}, "loss": [{"name": "ce"}]}


def test_a_worker_fits_on_one_node() -> None:
    nodes = [{"CPU": 7.0, "GPU": 2.0}, {"CPU": 4.0}, {"CPU": 3.0, "GPU": 4.0, "memory": 1e9}, {}]
    assert num_fitting(nodes, {"CPU": 4.0}) == 2
    assert num_fitting(nodes, {"CPU": 1.0}) == 14
    assert num_fitting(nodes, {"CPU": 2.0, "GPU": 1.0}) == 3
    assert num_fitting([], {"CPU": 1.0}) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_training_whose_place_is_occupied_fails_after_wait_s(tree: Tree) -> None:
    config = config_of(tree(**LABELS, ray={"address": "local", "num_workers": 2, "wait_s": 1}))
    occupied = placement_group([{"CPU": NUM_CPUS - 1}])
    ray.get(occupied.ready())
    try:
        with raises("train.no-place", ResourceError, expected="room for 2 x 1 CPU") as caught:
            train_student(config)
    finally:
        remove_placement_group(occupied)
    assert caught.value.got == "room for 2 where nothing else runs (1 of 2 CPU free)"
    assert "ray.num_workers=2" in str(caught.value.where)


@pytest.mark.usefixtures("ray_cluster")
def test_workers_that_have_run_and_lost_their_place_fail_with_exit_code_1() -> None:
    """Not with the exit code 2 of bad input: the same command may succeed later."""
    warnings: list[str] = []
    monitor = PlacementMonitor(RayConfig(num_workers=8, min_workers=5, wait_s=1e-6), warnings.append)
    monitor.on_running(6)
    monitor.on_waiting(repeated=False)
    with raises("train.no-place", TrainingError, exit_code=1):
        monitor.on_waiting(repeated=True)
    assert warnings[0] == "6 of 8 workers run: there is no room for more"
    assert "for room for 5 x 1 CPU; there is room for 2 where nothing else runs" in warnings[1]
    assert len(warnings) == 2


class FailingTrainer:
    """The interface of a trainer whose workers die while they start, ``times`` times."""

    def __init__(self, times: int) -> None:
        self.times, self.fits = times, 0

    def fit(self) -> None:
        self.fits += 1
        if self.fits <= self.times:
            raise ControllerError(ActorDiedError())


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_workers_that_die_while_they_start_are_restarted_as_often_as_others() -> None:
    event_actor = EventActor.remote()
    twice = FailingTrainer(2)
    fit_with_restarts(lambda: cast(TorchTrainer, twice), event_actor, print, max_failures=2)
    assert twice.fits == 3
    with raises("train.failed", TrainingError):
        fit_with_restarts(lambda: cast(TorchTrainer, FailingTrainer(2)), event_actor, print, max_failures=0)


def test_min_workers_above_num_workers_is_refused() -> None:
    with pytest.raises(ValueError, match="min_workers is 3; expected at most num_workers, 2"):
        RayConfig(num_workers=2, min_workers=3)
