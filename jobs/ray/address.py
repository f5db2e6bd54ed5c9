"""What ``ray.address`` means, without an import of Ray."""

from __future__ import annotations

import os

from jobs.observability.log import emit

# Ray sets this in the driver of a submitted job.
JOB_ENV = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def starts_locally(address: str) -> bool:
    """Whether this process starts a private cluster: a submitted job runs on the cluster it was submitted to, as a
    local one would escape the job's resources.
    """
    return address == "local" and JOB_ENV not in os.environ


def announce(address: str) -> None:
    """Logs what the next seconds are for: Ray and torch take long to import."""
    if address == "none":
        return
    text = "starting Ray on this machine" if starts_locally(address) else "connecting to the Ray cluster"
    emit(f"{text} (ray.address={address})", event="stage")
