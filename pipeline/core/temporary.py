"""Temporary folders of a process. The folders of workers lie in a folder of their driver, which removes them even if a
worker is killed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "STILLROOM_SCRATCH"


def temporary_folder(prefix: str = "stillroom-") -> tempfile.TemporaryDirectory[str]:
    """A new folder, removed at the end of a ``with`` or by ``cleanup()``."""
    parent = os.environ.get(VARIABLE)
    # A worker may outlive its driver, and the driver's folder.
    folder = parent if parent and Path(parent).is_dir() else None
    # Another process may still write into the folder while it is removed, which is no error.
    return tempfile.TemporaryDirectory(prefix=prefix, dir=folder, ignore_cleanup_errors=True)


@contextmanager
def shared_with_children() -> Generator[None]:
    """One folder for the temporary folders of this process and of its child processes, which must end before it is
    removed at the end of the ``with``.
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
