"""Switches of torch for a whole training: compilation, synchronised BatchNorm and deterministic algorithms."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager

import torch

from pipeline.core.errors import ConfigError, ResourceError, TrainingError, cause

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
# The two that cuBLAS documents as deterministic.
_DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")


def check_compiler(device: torch.device) -> None:
    """Compiles one line for this device and runs it.

    Raises:
        ResourceError: this machine cannot, for example without a C++ compiler, or on a GPU without Triton.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # inductor raises different types, by the tool that is missing
        raise ResourceError(
            "torch.compile does not work on this machine",
            code="train.compile-unavailable",
            where=f"train.compile=true, device {device.type}",
            got=cause(getattr(error, "inner_exception", error)),
            expected="a C++ compiler with Python's headers, and on a GPU Triton",
            next_step="install what is missing on every node, or set train.compile=false",
        ) from error


def check_sync_batch_norm(device: torch.device) -> None:
    """
    Raises:
        ConfigError: the device is a CPU, for which torch has no synchronised BatchNorm.
    """
    if device.type != "cpu":
        return
    raise ConfigError(
        "torch has no synchronised BatchNorm for CPUs",
        code="train.sync-batch-norm-on-cpu",
        where="train.sync_batch_norm",
        got="true, on a CPU",
        expected="a GPU for each rank",
        next_step="set ray.use_gpu=true, or train.sync_batch_norm=false: each rank then has statistics of its rows",
    )


@contextmanager
def deterministic(enabled: bool) -> Generator[None]:
    """Selects deterministic algorithms in the whole process, until the end of the block, if enabled.

    Raises:
        TrainingError: an operation in the block has no deterministic form.
    """
    if not enabled:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "use_deterministic_algorithms" not in str(error):
            raise
        raise TrainingError(
            "an operation has no deterministic form",
            code="train.not-deterministic",
            where="train.deterministic=true",
            got=str(error).split(",")[0],
            next_step="set train.deterministic=false, or use another student or loss, in another run.url",
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def demand_workspace() -> None:
    """Sets the variable that makes cuBLAS deterministic. Call it before cuBLAS is first used, which reads it.

    Raises:
        ConfigError: the environment sets a workspace that is not deterministic.
    """
    given = os.environ.setdefault(_CUBLAS, _DETERMINISTIC_WORKSPACES[0])
    if given not in _DETERMINISTIC_WORKSPACES:
        raise ConfigError(
            "the environment makes the results of cuBLAS differ from run to run",
            code="train.cublas-workspace",
            where=_CUBLAS,
            got=given,
            expected=" or ".join(_DETERMINISTIC_WORKSPACES),
            next_step=f"unset {_CUBLAS}, or set train.deterministic=false",
        )
