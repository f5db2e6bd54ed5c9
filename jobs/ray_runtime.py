"""Reach a Ray cluster, or start one here, and say plainly what it lacks."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import AuthenticationError

from pipeline.errors import ResourceError
from schemas.config import RayConfig

# Ray sets this in the driver of a submitted job.
_JOB_ENV = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@contextmanager
def cluster(config: RayConfig) -> Iterator[None]:
    """A connection to the cluster of ``ray.address`` for the length of a ``with``; one that stands is used as it is,
    and ``none`` asks for none.

    Raises:
        ResourceError: there is no cluster at this address.
    """
    if config.address == "none" or ray.is_initialized():
        yield
        return
    _connect(config.address)
    try:
        yield
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    common = {"log_to_driver": False, "logging_level": logging.WARNING}
    try:
        # A submitted job runs on the cluster it was submitted to: a local one would escape the job's resources.
        if address == "local" and _JOB_ENV not in os.environ:
            # A private cluster phones nowhere. That Ray guards it with a token is as it should be, and no news.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
            ray.init(address="local", include_dashboard=False, **common)
        else:
            ray.init(address="auto" if address == "local" else address, **common)
    except (ConnectionError, ValueError, AuthenticationError) as error:
        raise ResourceError(
            "no Ray cluster answers",
            where=f"ray.address={address}",
            got=str(error).splitlines()[0],
            next_step="start one (ray start --head), or set ray.address=local to start one here",
        ) from error


def node_name() -> str:
    """This machine among those of the cluster: its host, and under Ray the beginning of its node's id."""
    host = platform.node()
    return f"{host}:{ray.get_runtime_context().get_node_id()[:8]}" if ray.is_initialized() else host


def require_resources(needed: dict[str, float], *, what: str, where: str) -> None:
    """
    Raises:
        ResourceError: the whole cluster, idle, could not run it.
    """
    available = ray.cluster_resources()
    lacking = {name: amount for name, amount in needed.items() if amount > available.get(name, 0)}
    if lacking:
        raise ResourceError(
            f"{what} cannot be placed on this cluster",
            where=where,
            got=", ".join(f"{available.get(name, 0):g} {name}" for name in lacking),
            wanted=", ".join(f"{amount:g} {name}" for name, amount in lacking.items()),
            next_step=f"lower the keys above, or add nodes with {' and '.join(lacking)}",
        )


def slots(resources: dict[str, float]) -> int:
    """How many tasks with these resources the cluster runs at once, at least one."""
    available = ray.cluster_resources()
    return max(1, min(int(available.get(name, 0) // amount) for name, amount in resources.items() if amount))


def num_slots(config: RayConfig) -> int:
    """How many cache tasks run at once; inside ``cluster``."""
    if config.address == "none":
        return 1
    return slots({"CPU": float(config.cpus_per_task), "GPU": config.gpus_per_task})


def num_tasks_here(config: RayConfig) -> int:
    """How many cache tasks this machine will run at once, before any cluster is reached; 0: others run them."""
    if config.address == "none":
        return 1
    if config.address == "local" and _JOB_ENV not in os.environ:
        return max(1, len(os.sched_getaffinity(0)) // config.cpus_per_task)
    return 0
