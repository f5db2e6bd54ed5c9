"""A user's own module named ``jobs``, which Python would find before Stillroom's package."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePath

from pipeline.core.errors import InputError

_NAME = "jobs"
_OURS = PurePath(_NAME, "fan_out.py")


def check_shadowing(files: Iterable[PurePath], *, folder: Path, next_step: str) -> None:
    """
    Args:
        files: relative to a folder that stands first on the path of Ray's workers.

    Raises:
        InputError: a module of that folder hides Stillroom's.
    """
    names = set(files)
    hiding = {PurePath(f"{_NAME}.py"), PurePath(_NAME, "__init__.py")} & names
    if hiding and _OURS not in names:
        raise InputError(
            f"a module of this folder hides Stillroom's package {_NAME} from Ray's workers",
            code="ray.hidden-package",
            where=str(folder),
            got=", ".join(str(path) for path in sorted(hiding)),
            expected=f"no module of the name {_NAME}",
            next_step=next_step,
        )
