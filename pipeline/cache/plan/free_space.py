"""Checks before a build that the local disks have room for its files.

Estimates have a lower bound: a build that cannot fit is refused, one that may not fit gives a warning.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipeline import storage
from pipeline.cache.plan.build_plan import plan_size
from pipeline.cache.plan.plan_inputs import PlanInputs
from pipeline.cache.plan.shard_survey import Estimate, total
from pipeline.core.errors import StorageInputError


@dataclass(frozen=True, slots=True)
class _Need:
    """Bytes that a build writes for one purpose below a folder."""

    what: str
    folder: Path
    size_bytes: Estimate
    next_step: str


def check_space(inputs: PlanInputs, *, num_tasks: int) -> list[str]:
    """Checks this machine's file systems: the one of the cache, if it is local, and the one of scratch.

    Args:
        num_tasks: parts built at once on this machine; 0 if other machines build them, whose disks are not visible
            from here.

    Returns:
        Warnings about file systems with room for the lower bound only.

    Raises:
        StorageInputError: the lower bound does not fit.
    """
    by_file_system: dict[int, list[_Need]] = {}
    for need in _needs(inputs, num_tasks):
        by_file_system.setdefault(need.folder.stat().st_dev, []).append(need)
    warnings = (_check(needs) for needs in by_file_system.values())
    return [warning for warning in warnings if warning is not None]


def _needs(inputs: PlanInputs, num_tasks: int) -> list[_Need]:
    size = plan_size(inputs)
    needs: list[_Need] = []
    if (folder := storage.local_folder(inputs.cache.url)) is not None:
        needs.append(_Need("the cache", folder, size.parts_open, "choose another cache.url"))
    if num_tasks:
        scratch = Path(tempfile.gettempdir())
        next_step = "set TMPDIR to a larger disk, or lower cache.views_per_part"
        needs.append(_Need(f"scratch of {num_tasks} parts", scratch, size.scratch * num_tasks, next_step))
    return needs


def _check(needs: list[_Need]) -> str | None:
    """A warning about one file system, if it may be too small."""
    free = shutil.disk_usage(needs[0].folder).free
    needed = total(need.size_bytes for need in needs)
    what, where = " and ".join(need.what for need in needs), ", ".join(str(need.folder) for need in needs)
    if needed.low > free:
        raise StorageInputError(
            f"there is not enough room for {what}",
            code="storage.not-enough-room",
            where=where,
            got=f"{_gigabytes(free)} free",
            expected=f"at least {_gigabytes(needed.low)}, about {_gigabytes(needed.expected)}",
            next_step="; ".join(["free some space", *(need.next_step for need in needs)]),
        )
    if needed.expected > free:
        return (
            f"{what} may not fit: {_gigabytes(free)} free in {where}, expected "
            f"{_gigabytes(needed.low)} to {_gigabytes(needed.high)}"
        )
    return None


def _gigabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.3f} GB"
