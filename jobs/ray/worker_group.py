"""The workers of a training: their number, their resources, and how long they wait for free nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.train import ScalingConfig

from jobs.ray.cluster import alive_nodes, node_wait_s, num_fitting, resources_text
from jobs.ray.train_internals import WorkerGroupCallback, set_group_start_timeout
from pipeline.core.errors import ResourceError, StillroomError, TrainingError
from schemas.config import RayConfig

# An attempt requests as many workers as fitted when it began, and Ray Train notices a lost node up to 20 s late: a
# long attempt would wait for that node. Nodes that are alive take workers at once.
_ATTEMPT_TIMEOUT_S = 5.0
_WARN_AFTER_S, _WARN_INTERVAL_S = 30.0, 60.0
_POLL_S = 0.5


def min_workers(config: RayConfig) -> int:
    """The smallest number of workers with which a training starts or continues."""
    return config.min_workers or config.num_workers


def worker_resources(config: RayConfig) -> dict[str, float]:
    """The resources of one worker, by Ray's names."""
    return {"CPU": float(config.cpus_per_worker), **({"GPU": 1.0} if config.use_gpu else {})}


def worker_keys(config: RayConfig) -> str:
    """The keys of a config that set the number of workers and their resources, with their values."""
    names = ("num_workers", *(["min_workers"] if config.min_workers else []), "cpus_per_worker", "use_gpu")
    return ", ".join(f"ray.{name}={getattr(config, name)}" for name in names)


def scaling_config(config: RayConfig) -> ScalingConfig:
    """As many workers as fit where ``min_workers`` is given, else always all of them."""
    return ScalingConfig(
        num_workers=(config.min_workers, config.num_workers) if config.min_workers else config.num_workers,
        use_gpu=config.use_gpu,
        resources_per_worker=worker_resources(config),
        elastic_resize_monitor_interval_s=config.resize_every_s,
    )


class PlacementMonitor(WorkerGroupCallback):
    """Warns while workers wait to be placed, and ends the training after ``ray.wait_s``: Ray Train would wait forever.

    Args:
        warn: takes the text of each warning.
    """

    def __init__(self, config: RayConfig, warn: Callable[[str], Any]) -> None:
        self._config, self._warn = config, warn
        self._node_wait_s = node_wait_s(config)
        self._waiting_since: float | None = None
        self._warned_at: float | None = None
        self._has_run = False

    def on_start(self) -> None:
        set_group_start_timeout(min(_ATTEMPT_TIMEOUT_S, self._node_wait_s))

    def on_running(self, num_workers: int | None) -> None:
        self._waiting_since, self._warned_at, self._has_run = None, None, True
        if num_workers is not None and num_workers < self._config.num_workers:
            self._warn(f"{num_workers} of {self._config.num_workers} workers run: there is no room for more")

    def on_waiting(self, *, repeated: bool) -> None:
        """
        Raises:
            ResourceError, TrainingError: the workers waited for ``ray.wait_s`` seconds.
        """
        now = time.monotonic()
        self._waiting_since = now if self._waiting_since is None else self._waiting_since
        waited_s, nodes = now - self._waiting_since, alive_nodes()
        if waited_s > self._node_wait_s:
            raise self._timed_out(nodes)
        lacks_nodes = num_fitting(nodes, worker_resources(self._config)) < min_workers(self._config)
        warned_lately = self._warned_at is not None and now - self._warned_at < _WARN_INTERVAL_S
        if (lacks_nodes or waited_s > _WARN_AFTER_S) and not warned_lately:
            self._warned_at = now
            self._warn(f"waiting up to {self._node_wait_s:g} s for {self._expected}; there is {self._got(nodes)}")
        if repeated:
            # Ray Train repeats the step at once, which would occupy a whole CPU.
            time.sleep(_POLL_S)

    @property
    def _expected(self) -> str:
        return f"room for {min_workers(self._config)} x {resources_text(worker_resources(self._config))}"

    def _got(self, nodes: Sequence[Mapping[str, float]]) -> str:
        worker, free = worker_resources(self._config), ray.available_resources()
        totals = {name: sum(node.get(name, 0) for node in nodes) for name in worker}
        parts = ", ".join(f"{free.get(name, 0):g} of {total:g} {name} free" for name, total in totals.items())
        return f"room for {num_fitting(nodes, worker)} where nothing else runs ({parts})"

    def _timed_out(self, nodes: Sequence[Mapping[str, float]]) -> StillroomError:
        """A training that has run may be resumed unchanged when its nodes are back; another one requests too much."""
        kind = TrainingError if self._has_run else ResourceError
        return kind(
            f"the workers of this training could not be placed for {self._node_wait_s:g} s",
            code="train.no-place",
            where=worker_keys(self._config),
            got=self._got(nodes),
            expected=self._expected,
            next_step="add nodes, stop other work on them, lower the keys above, or raise ray.wait_s; then run the "
            "command again: it resumes from the last checkpoint",
        )
