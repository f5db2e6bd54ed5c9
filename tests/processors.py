"""Code on this processor as one with fewer instructions would run it."""

from __future__ import annotations

import os
import subprocess
import sys


def printed(code: str, *, capability: str) -> str:
    """What a Python process prints in which torch uses no more than these instructions: default, avx2 or avx512."""
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()
