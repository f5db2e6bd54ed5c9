"""The numeric environment: what must be equal for two builds to give the same bytes, and the switches that fix it."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
import torchvision

from pipeline.core.errors import LostGpuError, ResourceError

# What decodes, resizes, answers and encodes: another version of any may change bytes.
_PACKAGES = ("pillow", "timm", "numpy", "pyarrow")
# By their names in /proc/cpuinfo. Other instructions round the same.
_VECTOR_FLAGS = ("avx", "amx", "fma")
# Of mallopt(3), in bytes; an int is as much as it takes.
_M_TRIM_THRESHOLD, _MAX_STORED = -1, 2**31 - 1
_M_MMAP_THRESHOLD, _LARGEST_KEPT = -3, 32 << 20


def pin_numerics(threads: int) -> None:
    """Fixes every switch that changes results from run to run. Process-wide."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def numeric_env(device: torch.device, *, batch_size: int) -> dict[str, object]:
    """Equal environments give byte-identical parts. Names no host and no time."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_info("model name"),
        "device_type": device.type,
        # Decoding and resizing run on the CPU under any teacher. A virtual machine may hide instructions of its model,
        # and an environment variable keeps torch from some of them.
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "vector_flags": " ".join(sorted(flag for flag in _cpu_info("flags").split() if flag.startswith(_VECTOR_FLAGS))),
        # These two also tell the build, such as +cu132, which package metadata leaves out.
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        **{name: version(name) for name in _PACKAGES},
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "tf32": False,
        "cudnn_benchmark": False,
        "batch_size": batch_size,
    }


@cache
def _cpu_info(name: str) -> str:
    """Of the first core; the kind of machine where the system does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith(name))
    return next(found, platform.machine())


def trim_memory() -> None:
    """Gives freed memory back to the system, where the C library would keep it (glibc; elsewhere nothing is done).

    Arrays of a few MB that come and go in several threads leave gaps, and the process grows with every group.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_memory() -> None:
    """Keeps freed memory in this process for the next step (glibc; elsewhere nothing is done).

    Activations of some MB come and go every step. glibc gives them back to the system, and a step then waits for every
    page anew: on a CPU a fifth of a step with an online teacher.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _MAX_STORED)
        # Where the other is set this no longer grows by itself, up to this.
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)


def pick_device(use_gpu: bool) -> torch.device:
    """cuda where the task was given a GPU, else cpu.

    Raises:
        ResourceError: a GPU was given, and torch cannot use it.
    """
    if not use_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ResourceError(
            "a task was given a GPU that torch cannot use",
            where="ray.gpus_per_task",
            got=f"torch {torch.__version__}, CUDA_VISIBLE_DEVICES={visible_gpus()!r}",
            next_step="install torch for CUDA and the driver on every GPU node, or set ray.gpus_per_task=0",
        )
    return torch.device("cuda")


def visible_gpus() -> str | None:
    """What this process is told to see. CUDA looks once, when it starts."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def check_gpu(device: torch.device, seen: str | None) -> None:
    """Holds a process that is used again to the GPU it began with; ``seen`` is what ``visible_gpus`` said then.

    Raises:
        LostGpuError: it was given another one since, which CUDA will not see.
    """
    if device.type == "cuda" and visible_gpus() != seen:
        raise LostGpuError(
            "a worker lost its GPU",
            got=f"CUDA_VISIBLE_DEVICES={visible_gpus()!r}",
            expected=f"{seen!r}, which held the teacher",
            next_step="nothing: another process takes the part",
        )
