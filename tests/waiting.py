"""Waiting for what other processes do."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

_POLL_S = 0.02


def wait_until(
    condition: Callable[[], object],
    process: subprocess.Popen[Any] | None = None,
    log: Callable[[], str] = str,
    *,
    timeout_s: float = 400,
) -> None:
    """Waits until the condition holds. Fails with ``log()`` if it still does not when the process has ended, or after
    the timeout.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        has_ended = process is not None and process.poll() is not None
        if condition():
            return
        assert not has_ended, log()
        assert time.monotonic() < deadline, log()
        time.sleep(_POLL_S)
