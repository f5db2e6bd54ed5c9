"""Ray clusters: connect to one or start one, count what fits on its nodes, and wait for nodes that are missing."""

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
# Lost nodes may come back, also for a job that waits for none at its start.
_NODE_WAIT_S = 300.0


@contextmanager
def cluster(config: RayConfig) -> Generator[None]:
    """A connection to the cluster of ``ray.address`` for the length of a ``with``. An open connection is used as it is;
    ``none`` needs no connection.

    Raises:
        ResourceError: no cluster responds at this address, or Ray's folders cannot be written.
        ClusterError: Ray could not start.
    """
    if config.address == "none" or ray.is_initialized():
        yield
        return
    # Only a cluster that this process starts ends its workers with it.
    with shared_with_children() if starts_locally(config.address) else nullcontext():
        connect(config.address)
        try:
            yield
        finally:
            ray.shutdown()


def node_name() -> str:
    """The name of this node: its host, and under Ray the first digits of its node id."""
    host = platform.node()
    return _node_name(host, ray.get_runtime_context().get_node_id()) if ray.is_initialized() else host


def node_of(failure: RayError) -> str | None:
    """The node on which a task was lost. Ray names it for a node that died and for exhausted memory, but not for a
    worker that died; on a cluster of one node, it is that node.
    """
    nodes = ray.nodes()
    candidates = [node for node in nodes if len(nodes) == 1 or node["NodeID"] in str(failure)]
    return _node_name(candidates[0]["NodeManagerHostname"], candidates[0]["NodeID"]) if len(candidates) == 1 else None


def _node_name(host: str, node_id: str) -> str:
    return f"{host}:{node_id[:8]}"


def task_resources(config: RayConfig) -> dict[str, float]:
    """The resources of one cache task, by Ray's names."""
    resources = {"CPU": float(config.cpus_per_task), "GPU": config.gpus_per_task, **config.resources_per_task}
    return {name: amount for name, amount in resources.items() if amount}


def cpus_only(config: RayConfig) -> RayConfig:
    """For tasks that need no GPU and no custom resource, so that they run on any node."""
    return config.model_copy(update={"gpus_per_task": 0.0, "resources_per_task": {}})


def node_wait_s(config: RayConfig) -> float:
    """How long a job that has lost all its nodes waits for others."""
    return config.wait_s or _NODE_WAIT_S


def require_resources(needed: dict[str, float], *, what: str, where: str, num: int = 1, wait_s: float = 0.0) -> None:
    """Waits up to ``wait_s`` until ``num`` tasks of these resources fit on the cluster. An autoscaler sees the demand.

    Raises:
        ResourceError: they would not fit even if nothing else ran.
    """
    if num_slots(needed) < num and wait_s > 0:
        _wait_for_nodes(needed, what=what, num=num, wait_s=wait_s)
    if (num_fit := num_slots(needed)) >= num:
        return
    waited = f" after {wait_s:g} s (ray.wait_s)" if wait_s > 0 else ""
    raise ResourceError(
        f"{what} cannot be placed on this cluster{waited}",
        code="ray.too-few-resources",
        where=where,
        got=_nodes_text(needed) + (f": room for {num_fit}" if num > 1 else ""),
        expected=_demand_text(num, needed),
        next_step="lower the keys above, add nodes, or set ray.wait_s where an autoscaler adds them",
    )


def _wait_for_nodes(needed: dict[str, float], *, what: str, num: int, wait_s: float) -> None:
    emit(f"waiting up to {wait_s:g} s for nodes: {what} needs {_demand_text(num, needed)}", event="waiting")
    deadline = time.monotonic() + wait_s
    # An autoscaler counts pending placement groups, and Ray removes them with their driver. A demand given to
    # request_resources would outlive a killed driver, and replace the demand of another job.
    group = placement_group([needed] * num)
    try:
        while num_slots(needed) < num and (left_s := deadline - time.monotonic()) > 0:
            time.sleep(min(_POLL_S, left_s))
    finally:
        remove_placement_group(group)


def resources_text(resources: dict[str, float]) -> str:
    """``4 CPU, 1 GPU``."""
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _demand_text(num: int, needed: dict[str, float]) -> str:
    return f"{num} x ({resources_text(needed)})" if num > 1 else resources_text(needed)


def _nodes_text(needed: dict[str, float]) -> str:
    """These resources of every node; equal nodes are counted."""
    kinds = Counter(resources_text({name: node.get(name, 0) for name in needed}) for node in alive_nodes())
    return "; ".join(f"{counted(count, 'node')} with {kind}" for kind, count in kinds.most_common())


def num_slots(resources: dict[str, float]) -> int:
    """How many tasks of these resources run at once on the nodes that are alive."""
    return num_fitting(alive_nodes(), resources)


def num_fitting(nodes: Sequence[Mapping[str, float]], resources: Mapping[str, float]) -> int:
    """How many tasks or workers of these resources fit on the nodes. Each lies on one node."""
    # Ray counts in ten-thousandths; 1 // 0.1 is 9.
    return sum(min(int(node.get(name, 0) / amount + 1e-6) for name, amount in resources.items()) for node in nodes)


def alive_nodes() -> list[dict[str, float]]:
    """The total resources of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def num_parallel_tasks(config: RayConfig) -> int:
    """How many cache tasks run at once; inside ``cluster``."""
    return 1 if config.address == "none" else max(1, num_slots(task_resources(config)))


def num_local_tasks(config: RayConfig) -> int:
    """How many cache tasks will run at once on this machine, before a connection; 0: they run on other machines."""
    if config.address == "none":
        return 1
    if starts_locally(config.address):
        return max(1, len(os.sched_getaffinity(0)) // config.cpus_per_task)
    return 0
