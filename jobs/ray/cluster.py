"""Reach a Ray cluster, or start one here, and say plainly what it lacks."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import ray
from ray.exceptions import RayError
from ray.util import placement_group, remove_placement_group

from jobs.observability.log import counted, emit
from jobs.ray.address import starts_locally
from jobs.ray.connection import connect
from pipeline.core.errors import ResourceError
from pipeline.core.temporary import shared_with_children
from schemas.config import RayConfig

_POLL_S = 0.5
# Nodes that were lost may come back, also to a job that waits for none at its start.
_NODE_WAIT_S = 300.0


@contextmanager
def cluster(config: RayConfig) -> Generator[None]:
    """A connection to the cluster of ``ray.address`` for the length of a ``with``; one that stands is used as it is,
    and ``none`` asks for none.

    Raises:
        ResourceError: no cluster answers at this address, or Ray's folders here cannot be written.
        ClusterError: Ray could not start here.
    """
    if config.address == "none" or ray.is_initialized():
        yield
        return
    # Only of a cluster that this process starts are the workers gone at its end.
    with shared_with_children() if starts_locally(config.address) else nullcontext():
        connect(config.address)
        try:
            yield
        finally:
            ray.shutdown()


def node_name() -> str:
    """This machine among those of the cluster: its host, and under Ray the beginning of its node's id."""
    host = platform.node()
    return _name(host, ray.get_runtime_context().get_node_id()) if ray.is_initialized() else host


def node_of(lost: RayError) -> str | None:
    """The node that a task was lost on. Ray names it of a node that died and of memory that ran out, not of a worker
    that died; where there is but one node, that one it is.
    """
    nodes = ray.nodes()
    found = [node for node in nodes if len(nodes) == 1 or node["NodeID"] in str(lost)]
    return _name(found[0]["NodeManagerHostname"], found[0]["NodeID"]) if len(found) == 1 else None


def _name(host: str, node_id: str) -> str:
    return f"{host}:{node_id[:8]}"


def task_resources(config: RayConfig) -> dict[str, float]:
    """What one cache task asks of its node."""
    asked = {"CPU": float(config.cpus_per_task), "GPU": config.gpus_per_task, **config.resources_per_task}
    return {name: amount for name, amount in asked.items() if amount}


def without_gpus(config: RayConfig) -> RayConfig:
    """For work that needs nothing but CPUs, and so can be done by any node."""
    return config.model_copy(update={"gpus_per_task": 0.0, "resources_per_task": {}})


def node_wait_s(config: RayConfig) -> float:
    """For how long work that has lost every place waits for another one."""
    return config.wait_s or _NODE_WAIT_S


def require_resources(needed: dict[str, float], *, what: str, where: str, num: int = 1, wait_s: float = 0.0) -> None:
    """Waits up to ``wait_s`` until ``num`` tasks with these resources each have a place, and shows an autoscaler what
    is missing meanwhile.

    Raises:
        ResourceError: the whole cluster, idle, could not run them.
    """
    if slots(needed) < num and wait_s > 0:
        _wait_for_nodes(needed, what=what, num=num, wait_s=wait_s)
    if (found := slots(needed)) >= num:
        return
    waited = f" after {wait_s:g} s (ray.wait_s)" if wait_s > 0 else ""
    raise ResourceError(
        f"{what} cannot be placed on this cluster{waited}",
        where=where,
        got=_shapes(needed) + (f": room for {found}" if num > 1 else ""),
        expected=_times(num, needed),
        next_step="lower the keys above, add nodes, or set ray.wait_s where an autoscaler adds them",
    )


def _wait_for_nodes(needed: dict[str, float], *, what: str, num: int, wait_s: float) -> None:
    emit(f"waiting up to {wait_s:g} s for nodes: {what} needs {_times(num, needed)}", event="waiting")
    deadline = time.monotonic() + wait_s
    # A placement group that waits is what an autoscaler counts, and Ray forgets it with its driver. What is told to
    # request_resources would stay after a driver that was killed, and replace what another job has asked for.
    group = placement_group([needed] * num)
    try:
        while slots(needed) < num and (left_s := deadline - time.monotonic()) > 0:
            time.sleep(min(_POLL_S, left_s))
    finally:
        remove_placement_group(group)


def amounts(resources: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _times(num: int, needed: dict[str, float]) -> str:
    return f"{num} x ({amounts(needed)})" if num > 1 else amounts(needed)


def _shapes(needed: dict[str, float]) -> str:
    """What the nodes have of it, equal ones together."""
    shapes = Counter(amounts({name: node.get(name, 0) for name in needed}) for node in living_nodes())
    return "; ".join(f"{counted(count, 'node')} with {shape}" for shape, count in shapes.most_common())


def slots(resources: dict[str, float]) -> int:
    """How many tasks with these resources the nodes that are there run at once."""
    return room(living_nodes(), resources)


def room(nodes: Sequence[Mapping[str, float]], resources: Mapping[str, float]) -> int:
    """How many tasks or workers fit on nodes of these resources: halves on two nodes make no whole."""
    # Ray counts in ten-thousandths; 1 // 0.1 is 9.
    return sum(min(int(node.get(name, 0) / amount + 1e-6) for name, amount in resources.items()) for node in nodes)


def living_nodes() -> list[dict[str, float]]:
    """What each node has that is alive, used or not."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def num_slots(config: RayConfig) -> int:
    """How many cache tasks run at once; inside ``cluster``."""
    if config.address == "none":
        return 1
    return max(1, slots(task_resources(config)))


def num_tasks_here(config: RayConfig) -> int:
    """How many cache tasks this machine will run at once, before any cluster is reached; 0: others run them."""
    if config.address == "none":
        return 1
    if starts_locally(config.address):
        return max(1, len(os.sched_getaffinity(0)) // config.cpus_per_task)
    return 0
