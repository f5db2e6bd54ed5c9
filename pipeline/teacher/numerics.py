"""The numeric environment: properties that must be equal for two builds to produce the same bytes, and its switches."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
import torchvision

from pipeline.core.errors import LostGpuError, ResourceError
from schemas.config import Precision

# These packages decode, resize, infer and encode: another version of any may change bytes.
_PACKAGES = ("pillow", "timm", "numpy", "pyarrow")
# Prefixes of the names in /proc/cpuinfo. Other instructions do not change how results are rounded.
_VECTOR_FLAGS = ("avx", "amx", "fma")
_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Parameters of mallopt(3) and their values in bytes; mallopt takes an int.
_M_TRIM_THRESHOLD, _MAX_TRIM_THRESHOLD = -1, 2**31 - 1
_M_MMAP_THRESHOLD, _MAX_MMAP_THRESHOLD = -3, 32 << 20


def pin_numerics(threads: int) -> None:
    """Fixes every switch that changes results from run to run. Process-wide."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Autocast for the forward pass of a ``precision``; disabled for fp32."""
    dtype = _AUTOCAST_DTYPES.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def precision_warnings(device: torch.device, precisions: Mapping[str, Precision]) -> list[str]:
    """One line for each precision below fp32 that this CPU has no instructions for.

    Args:
        precisions: by their YAML keys.
    """
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return []
    # The condition under which torch passes a convolution to oneDNN.
    is_fast = {
        "fp32": True,
        "bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "fp16": torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return [
        f"{key} is {precision}, which this CPU emulates: a convolution can take ten times as long as in fp32; "
        f"set {key}=fp32, or use a GPU or a CPU with instructions for {precision}"
        for key, precision in precisions.items()
        if not is_fast[precision]
    ]


def numeric_env(device: torch.device, *, batch_size: int) -> dict[str, object]:
    """Properties of hardware and software. Equal environments produce byte-identical parts. No host name, no time."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_info("model name"),
        "device_type": device.type,
        # The CPU decodes and resizes for every teacher. A virtual machine may hide instructions of its processor, and
        # an environment variable can restrict torch to fewer of them.
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "vector_flags": " ".join(sorted(flag for flag in _cpu_info("flags").split() if flag.startswith(_VECTOR_FLAGS))),
        # These two include the build, such as +cu132, which package metadata does not.
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        **_package_versions(),
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "tf32": False,
        "cudnn_benchmark": False,
        "batch_size": batch_size,
    }


@cache
def _package_versions() -> dict[str, str]:
    return {name: version(name) for name in _PACKAGES}


@cache
def _cpu_info(name: str) -> str:
    """A field of /proc/cpuinfo for the first core; the machine type where the system has no such field."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    values = (line.partition(":")[2].strip() for line in lines if line.startswith(name))
    return next(values, platform.machine())


def release_freed_memory() -> None:
    """Returns freed memory to the system (glibc; elsewhere this does nothing).

    Several threads allocate and free arrays of a few MB. They leave gaps, so the process would grow with every group.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def retain_freed_memory() -> None:
    """Retains freed memory in this process for the next step (glibc; elsewhere this does nothing).

    Each step allocates and frees activations of some MB. By default glibc returns them to the system, and the next
    step waits for every page again: on a CPU this is a fifth of a step with an online teacher.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _MAX_TRIM_THRESHOLD)
        # Setting the trim threshold turns off the growth of this one, so it gets the maximum that it would grow to.
        mallopt(_M_MMAP_THRESHOLD, _MAX_MMAP_THRESHOLD)


def pick_device(use_gpu: bool) -> torch.device:
    """cuda where the task has a GPU, else cpu.

    Raises:
        ResourceError: the task has a GPU, and torch cannot use it.
    """
    if not use_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ResourceError(
            "a task was given a GPU that torch cannot use",
            code="ray.unusable-gpu",
            where="ray.gpus_per_task",
            got=f"torch {torch.__version__}, CUDA_VISIBLE_DEVICES={visible_gpus()!r}",
            next_step="install torch for CUDA and the driver on every GPU node, or set ray.gpus_per_task=0",
        )
    return torch.device("cuda")


def visible_gpus() -> str | None:
    """``CUDA_VISIBLE_DEVICES``: the GPUs that this process may use. CUDA reads it once, at its initialisation."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def check_gpu(device: torch.device, first_visible: str | None) -> None:
    """Checks that a reused process still has the GPU that it started with.

    Args:
        first_visible: ``visible_gpus`` at the time when the device was first used.

    Raises:
        LostGpuError: the process has since been assigned a different GPU, which CUDA does not notice.
    """
    if device.type == "cuda" and visible_gpus() != first_visible:
        raise LostGpuError(
            "a worker lost its GPU",
            code="ray.lost-gpu",
            got=f"CUDA_VISIBLE_DEVICES={visible_gpus()!r}",
            expected=f"{first_visible!r}, which holds the teacher",
            next_step="nothing: another process retries the part",
        )
