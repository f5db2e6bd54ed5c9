"""Jobs in other processes, as a user starts them in a terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import yaml

_started: list[subprocess.Popen[bytes]] = []


def write(path: Path, tree: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def start(job: str, config: Path) -> subprocess.Popen[bytes]:
    """Starts a job in a new session in which Ctrl-C works. Its output is ``log_of(config)``."""
    command = [sys.executable, "-m", f"jobs.{job}", str(config)]
    with config.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, preexec_fn=enable_ctrl_c)
    _started.append(process)
    return process


def enable_ctrl_c() -> None:
    """Restores the handler of Ctrl-C, which processes in the background of a script ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_build(config: Path) -> subprocess.Popen[bytes]:
    return start("build_cache", config)


def log_of(config: Path) -> str:
    return config.with_suffix(".log").read_text()


def end_all() -> None:
    """Ends jobs that a failed test left running."""
    for process in _started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    _started.clear()
