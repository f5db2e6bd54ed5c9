"""Whether local disks have room for what a build will write, before it writes anything.

Estimates have a lower bound. What cannot fit is refused; what may not fit is said.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipeline import storage
from pipeline.cache.plan.build_plan import PlanInputs, plan_size
from pipeline.cache.plan.shard_survey import Estimate
from pipeline.core.errors import StorageInputError


@dataclass(frozen=True, slots=True)
class _Need:
    """Bytes that one purpose takes of the file system of a folder."""

    what: str
    folder: Path
    size_bytes: Estimate
    way_out: str


def check_space(inputs: PlanInputs, *, num_tasks: int) -> list[str]:
    """Looks at this machine's file systems: the cache's, if it is local, and scratch.

    Args:
        num_tasks: parts built at once on this machine; 0 where others build them, whose scratch cannot be seen from
            here.

    Returns:
        Warnings, where the estimate does not fit but its lower bound does.

    Raises:
        StorageInputError: not even the lower bound fits.
    """
    found = [_check(needs) for needs in _by_file_system(_needs(inputs, num_tasks))]
    return [warning for warning in found if warning is not None]


def _needs(inputs: PlanInputs, num_tasks: int) -> list[_Need]:
    size = plan_size(inputs)
    needs: list[_Need] = []
    if (folder := storage.local_folder(inputs.cache.url)) is not None:
        needs.append(_Need("the cache", folder, size.parts_open, "choose another cache.url"))
    if num_tasks:
        scratch = Path(tempfile.gettempdir())
        way_out = "set TMPDIR to a larger disk, or lower cache.views_per_part"
        needs.append(_Need(f"scratch of {num_tasks} parts", scratch, size.scratch * num_tasks, way_out))
    return needs


def _by_file_system(needs: list[_Need]) -> list[list[_Need]]:
    found: dict[int, list[_Need]] = {}
    for need in needs:
        found.setdefault(need.folder.stat().st_dev, []).append(need)
    return list(found.values())


def _check(needs: list[_Need]) -> str | None:
    """A warning on one file system, if there is one."""
    free = shutil.disk_usage(needs[0].folder).free
    expected = sum((need.size_bytes for need in needs), Estimate.exactly(0))
    what, where = " and ".join(need.what for need in needs), ", ".join(str(need.folder) for need in needs)
    if expected.low > free:
        raise StorageInputError(
            f"there is not enough room for {what}",
            where=where,
            got=f"{_gigabytes(free)} free",
            expected=f"at least {_gigabytes(expected.low)}, about {_gigabytes(expected.expected)}",
            next_step="; ".join(["make room", *(need.way_out for need in needs)]),
        )
    if expected.expected > free:
        return (
            f"{what} may not fit: {_gigabytes(free)} free in {where}, wanted "
            f"{_gigabytes(expected.low)} to {_gigabytes(expected.high)}"
        )
    return None


def _gigabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.3f} GB"
