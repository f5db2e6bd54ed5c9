"""The workers of a training: how many there may be, what each takes, and how long a place for them is waited for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.train import ScalingConfig
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

from jobs.ray.cluster import amounts, living_nodes, node_wait_s, room
from pipeline.core.errors import ResourceError, StillroomError, TrainingError
from schemas.config import RayConfig

# An attempt asks for as many workers as fitted when it began, and Ray Train hears of a lost node up to 20 s late: a
# long attempt would wait for that node. Nodes that are there take workers at once.
_ATTEMPT_S = 5.0
_SAY_AFTER_S, _SAY_EVERY_S = 30.0, 60.0
_POLL_S = 0.5
_WAITING = (InitializingState, SchedulingState, ReschedulingState, RestartingState, ResizingState)


def fewest(config: RayConfig) -> int:
    """With how many workers a training begins or goes on at the least."""
    return config.min_workers or config.num_workers


def per_worker(config: RayConfig) -> dict[str, float]:
    """The resources of one worker, by Ray's names."""
    return {"CPU": float(config.cpus_per_worker), **({"GPU": 1.0} if config.use_gpu else {})}


def keys_of(config: RayConfig) -> str:
    """What in a config says how many workers there are and what they take."""
    names = ("num_workers", *(["min_workers"] if config.min_workers else []), "cpus_per_worker", "use_gpu")
    return ", ".join(f"ray.{name}={getattr(config, name)}" for name in names)


def scaling(config: RayConfig) -> ScalingConfig:
    """As many workers as fit, where ``min_workers`` is given; else always all of them."""
    return ScalingConfig(
        num_workers=(config.min_workers, config.num_workers) if config.min_workers else config.num_workers,
        use_gpu=config.use_gpu,
        resources_per_worker=per_worker(config),
        elastic_resize_monitor_interval_s=config.resize_every_s,
    )


def leaving() -> bool:
    """Whether this worker was told that a node of its group is about to be taken away (``ray drain-node``).

    ``ray.train.get_preemption_info`` says the same, and waits for all workers each time.
    """
    return get_train_context().preemption_context.preemption_info is not None


class Placement(ControllerCallback):
    """Says what workers wait for, and gives up after ``ray.wait_s``, where Ray Train would try for ever.

    It lives in Ray Train's controller, which calls it at each step of its own. An error raised here ends the training.
    """

    def __init__(self, config: RayConfig, warn: Callable[[str], Any]) -> None:
        self._config, self._warn = config, warn
        self._node_wait_s = node_wait_s(config)
        self._since: float | None = None
        self._told_at: float | None = None
        self._has_run = False

    def after_controller_start(self, train_run_context: Any) -> None:  # noqa: ARG002
        os.environ.setdefault(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, str(min(_ATTEMPT_S, self._node_wait_s)))

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        if isinstance(current_state, RunningState | PreemptingState):
            self._placed(previous_state)
        elif isinstance(current_state, _WAITING):
            self._wait()
            if type(previous_state) is type(current_state):
                # Ray Train asks again at once, and would take a whole CPU for it.
                time.sleep(_POLL_S)

    def _placed(self, previous: TrainControllerState) -> None:
        self._since, self._told_at, self._has_run = None, None, True
        decision = previous.scaling_decision if isinstance(previous, SchedulingState) else None
        if isinstance(decision, ResizeDecision) and decision.num_workers < self._config.num_workers:
            self._warn(f"{decision.num_workers} of {self._config.num_workers} workers run: there is no room for more")

    def _wait(self) -> None:
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        nodes = living_nodes()
        if now - self._since > self._node_wait_s:
            raise self._unplaced(nodes)
        lacks_nodes = room(nodes, per_worker(self._config)) < fewest(self._config)
        told_lately = self._told_at is not None and now - self._told_at < _SAY_EVERY_S
        if (lacks_nodes or now - self._since > _SAY_AFTER_S) and not told_lately:
            self._told_at = now
            self._warn(f"waiting up to {self._node_wait_s:g} s for {self._expected}; there is {self._got(nodes)}")

    @property
    def _expected(self) -> str:
        return f"room for {fewest(self._config)} x {amounts(per_worker(self._config))}"

    def _got(self, nodes: Sequence[Mapping[str, float]]) -> str:
        worker, free = per_worker(self._config), ray.available_resources()
        totals = {name: sum(node.get(name, 0) for node in nodes) for name in worker}
        parts = ", ".join(f"{free.get(name, 0):g} of {total:g} {name} free" for name, total in totals.items())
        return f"room for {room(nodes, worker)} where nothing else runs ({parts})"

    def _unplaced(self, nodes: Sequence[Mapping[str, float]]) -> StillroomError:
        """One that has run may go on when its nodes are back, as it is; another one asks for too much."""
        kind = TrainingError if self._has_run else ResourceError
        return kind(
            f"the workers of this training had no place for {self._node_wait_s:g} s",
            where=keys_of(self._config),
            got=self._got(nodes),
            expected=self._expected,
            next_step="add nodes, end what else runs on them, lower the keys above, or raise ray.wait_s; then run the "
            "command again: it goes on from the last checkpoint",
        )
