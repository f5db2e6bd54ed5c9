"""Detects a user's own module named ``jobs``, which Python would import instead of Stillroom's package."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePath

from pipeline.core.errors import InputError

_NAME = "jobs"
# A folder with this file is a checkout of Stillroom.
_MARKER = PurePath(_NAME, "build_cache.py")


def check_shadowing(files: Iterable[PurePath], *, folder: Path, next_step: str) -> None:
    """
    Args:
        files: relative to a folder that comes first on the import path of Ray's workers.

    Raises:
        InputError: a module of that folder hides Stillroom's package.
    """
    names = set(files)
    hiding = {PurePath(f"{_NAME}.py"), PurePath(_NAME, "__init__.py")} & names
    if hiding and _MARKER not in names:
        raise InputError(
            f"a module of this folder hides Stillroom's package {_NAME} from Ray's workers",
            code="ray.hidden-package",
            where=str(folder),
            got=", ".join(str(path) for path in sorted(hiding)),
            expected=f"no module named {_NAME}",
            next_step=next_step,
        )
