"""Ray Train's internals: its controller's states and its preemption notices.

Apart from ``core_internals``, since a build does not need the seconds in which Ray Train is imported.
"""

from __future__ import annotations

import os
from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.controller.state import (
    InitializingState,
    PreemptingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
    RunningState,
    SchedulingState,
    TrainControllerState,
)
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision

_WAITING = (InitializingState, SchedulingState, ReschedulingState, RestartingState, ResizingState)


def preemption_pending() -> bool:
    """Whether a node of this worker's group is about to be preempted (``ray drain-node``).

    ``ray.train.get_preemption_info`` returns the same, but waits for all workers at each call.
    """
    return get_train_context().preemption_context.preemption_info is not None


def set_group_start_timeout(timeout_s: float) -> None:
    """Limits an attempt of Ray Train to place its workers. Takes effect in the controller's process."""
    os.environ.setdefault(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, str(timeout_s))


class RayTrainer(TorchTrainer):
    """Ray's trainer without its placement group cleaner, which can end a healthy training.

    Every second the cleaner queries the state of the controller, at RAY_ADDRESS, or else at the cluster that
    ``ray start`` started last on the machine, or else at port 8265, where a private cluster has no dashboard. If that
    is another cluster, it has no such controller: the cleaner then assumes that the controller is dead, and removes
    the workers. Without the cleaner Ray removes them when this job ends.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]


class WorkerGroupCallback(ControllerCallback):
    """The states of Ray Train's controller as three events. The controller calls them in its own process.

    An exception of an event ends the training.
    """

    def on_start(self) -> None:
        """The controller has started."""

    def on_running(self, num_workers: int | None) -> None:
        """The workers run; ``num_workers`` is None where their number did not change."""

    def on_waiting(self, *, repeated: bool) -> None:
        """The workers wait to be placed; ``repeated`` where the controller tries the same step again."""

    def after_controller_start(self, train_run_context: Any) -> None:  # noqa: ARG002
        self.on_start()

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        if isinstance(current_state, RunningState | PreemptingState):
            decision = previous_state.scaling_decision if isinstance(previous_state, SchedulingState) else None
            self.on_running(decision.num_workers if isinstance(decision, ResizeDecision) else None)
        elif isinstance(current_state, _WAITING):
            self.on_waiting(repeated=type(previous_state) is type(current_state))
