"""A Ray cluster in a process group of its own, ended by process id and never by name."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

_START_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class HeadNode:
    """Where a started cluster listens, and the environment that may talk to it."""

    address: str
    dashboard_url: str
    env: dict[str, str]
    session: int

    def busy_workers(self) -> list[int]:
        """The processes that run a task of ``fan_out`` now: Ray names its workers after their task."""
        pids = [found.pid for found in psutil.process_iter() if _name_of(found).startswith("ray::_call")]
        return [pid for pid in pids if _session_of(pid) == self.session]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _name_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


@contextmanager
def head_node(folder: Path, *, num_cpus: int) -> Iterator[HeadNode]:
    """``ray start --head --block`` on loopback with a token of its own."""
    port, dashboard_port = free_port(), free_port()
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    command = [Path(sys.executable).parent / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    options = [
        f"--port={port}",
        f"--dashboard-port={dashboard_port}",
        # Ray's own is one number for a whole machine; without it, a cluster beside this one takes no jobs.
        f"--dashboard-agent-listen-port={free_port()}",
        f"--num-cpus={num_cpus}",
        "--include-dashboard=true",
    ]
    with (folder / "ray.log").open("wb") as log:
        process = subprocess.Popen([*command, *options], env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for(dashboard_port, process)
            yield HeadNode(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard_port}", env, process.pid)
        finally:
            _end(process)


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "ray start ended by itself"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError(f"no dashboard on port {port} after {_START_TIMEOUT_S} s")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ray's workers are process groups of their own, but they stay in the session that ``start_new_session`` made."""
    members = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    with _gone():
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    members += [found.pid for found in psutil.process_iter() if _session_of(found.pid) == process.pid]
    for pid in set(members):
        with _gone():
            os.kill(pid, signal.SIGKILL)


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


@contextmanager
def _gone() -> Iterator[None]:
    try:
        yield
    except ProcessLookupError:
        return
