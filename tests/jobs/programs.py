"""Python programs in other processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_python(*arguments: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` with its output. Ray's variables of this process are not passed on, ``env`` is added."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env={**plain, **env}, capture_output=True, text=True, check=False)
