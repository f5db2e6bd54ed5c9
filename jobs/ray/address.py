"""The meaning of ``ray.address``, without an import of Ray."""

from __future__ import annotations

import os

from jobs.observability.log import emit

# Ray sets this in the driver of a submitted job.
JOB_ENV = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def starts_locally(address: str) -> bool:
    """Whether this process starts a private cluster. A submitted job does not: it runs on the cluster that it was
    submitted to, where a private cluster would exceed the job's resources.
    """
    return address == "local" and JOB_ENV not in os.environ


def announce(address: str) -> None:
    """Logs what takes the next seconds: the imports of Ray and torch."""
    if address == "none":
        return
    text = "starting Ray on this machine" if starts_locally(address) else "connecting to the Ray cluster"
    emit(f"{text} (ray.address={address})", event="stage")
