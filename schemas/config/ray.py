"""``ray``: the cluster, and resources of its tasks and workers."""

from __future__ import annotations

import re

from pydantic import Field, field_validator, model_validator

from schemas.config.section import Section

_RAY_ADDRESS = re.compile(r"(ray://)?(\[[0-9a-fA-F:.]+\]|[^\s/:]+):[0-9]{1,5}")


class RayConfig(Section):
    """How work is distributed."""

    address: str = Field("local", description="local, auto, none (no Ray: one process), or ray://host:port.")
    cpus_per_task: int = Field(1, ge=1, description="CPUs of one cache task, and the number of its decode threads.")
    gpus_per_task: float = Field(0, ge=0, description="GPUs of one cache task; a fraction lets tasks share one.")
    resources_per_task: dict[str, float] = Field(
        default_factory=dict, description="Custom resources of the cluster for one cache task, by name."
    )
    wait_s: float = Field(0, ge=0, description="Seconds to wait for nodes that an autoscaler adds.")
    max_retries: int = Field(
        3,
        ge=0,
        description="Retries of a part after worker crashes and storage failures; five times as many for lost nodes.",
    )
    part_timeout_s: float | None = Field(
        None, gt=0, description="Seconds after which an attempt at a part is ended and retried; null: never."
    )
    num_workers: int = Field(1, ge=1, description="DDP world size.")
    min_workers: int | None = Field(None, ge=1, description="Smallest world size to continue with; null: num_workers.")
    resize_every_s: float = Field(300, gt=0, description="Seconds between checks for resources for more workers.")
    cpus_per_worker: int = Field(1, ge=1, description="CPUs of one DDP worker.")
    use_gpu: bool = Field(False, description="One GPU per DDP worker, NCCL; else gloo.")
    max_failures: int = Field(0, ge=0, description="Restarts of a training after the death of a worker.")

    @field_validator("address")
    @classmethod
    def _check_address(cls, address: str) -> str:
        if address not in ("local", "auto", "none") and not _RAY_ADDRESS.fullmatch(address):
            raise ValueError(f"address is {address!r}; expected local, auto, none, HOST:PORT or ray://HOST:PORT")
        return address

    @field_validator("resources_per_task")
    @classmethod
    def _check_resources(cls, resources: dict[str, float]) -> dict[str, float]:
        for name, amount in resources.items():
            if name in ("CPU", "GPU", "memory", "object_store_memory"):
                raise ValueError(
                    f"{name} is built into Ray; expected cpus_per_task, gpus_per_task, or a custom resource"
                )
            # Tasks may share one unit, but get several only as whole units. Ray counts in ten-thousandths.
            if not (0.0001 <= amount <= 1 or (amount >= 1 and amount == int(amount))):
                raise ValueError(f"{name} is {amount:g}; expected 0.0001 to 1, or a whole number")
        return resources

    @model_validator(mode="after")
    def _check_part_timeout(self) -> RayConfig:
        if self.part_timeout_s is not None and self.address == "none":
            raise ValueError(
                "part_timeout_s ends a process of Ray, and address is none; expected null, or another address"
            )
        return self

    @model_validator(mode="after")
    def _check_workers(self) -> RayConfig:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers is {self.min_workers}; expected at most num_workers, {self.num_workers}")
        return self
