"""Temporary folders of one process. Where a driver gave its workers a folder, they lie in it and go with it: a worker
that is killed removes nothing itself.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "STILLROOM_SCRATCH"


def temporary_folder(prefix: str = "stillroom-") -> tempfile.TemporaryDirectory[str]:
    """A new folder that is removed at the end of a ``with``, or by ``cleanup()``."""
    parent = os.environ.get(VARIABLE)
    # A worker may outlive its driver, and the driver's folder.
    folder = parent if parent and Path(parent).is_dir() else None
    # What another process still writes into it at its end is no reason to fail.
    return tempfile.TemporaryDirectory(prefix=prefix, dir=folder, ignore_cleanup_errors=True)


@contextmanager
def shared_with_children() -> Generator[None]:
    """One folder for the temporary folders of this process and of those that it starts; removed at the end, by when
    they have to be gone.
    """
    with temporary_folder("stillroom-scratch-") as folder:
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = before
