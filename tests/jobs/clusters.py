"""Ray clusters in other processes, ended by process id and never by name."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest

_START_TIMEOUT_S = 180
_COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
# The head's id in Ray's provider for tests.
_HEAD_ID = "f" * 51 + "00000"


@dataclass(frozen=True, slots=True)
class HeadNode:
    """The addresses of a started cluster, and the environment of its clients."""

    address: str
    dashboard_url: str
    env: dict[str, str]
    session: int

    def busy_workers(self) -> list[int]:
        """The processes that run a task of ``fan_out`` now: Ray names its workers after their task."""
        pids = [process.pid for process in psutil.process_iter() if _runs_a_task(_name_of(process))]
        return [pid for pid in pids if _session_of(pid) == self.session]


def _runs_a_task(process_name: str) -> bool:
    """Tasks are named after their parts, as "cache: shard-00.tar, v0000-0001"; no other process of Ray has a colon."""
    return process_name.startswith("ray::") and ": " in process_name


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
def head_node(
    folder: Path, *, num_cpus: int, node_types: dict[str, Any] | None = None, python: str = sys.executable
) -> Iterator[HeadNode]:
    """``ray start --head --block`` on loopback with a token; with ``node_types`` also an autoscaler that starts such
    nodes on this machine.
    """
    port, dashboard_port = free_port(), free_port()
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    command = [python, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    options = [
        f"--port={port}",
        f"--dashboard-port={dashboard_port}",
        # Ray's default is one port for a whole machine, so another cluster could not take jobs.
        f"--dashboard-agent-listen-port={free_port()}",
        f"--num-cpus={num_cpus}",
        "--include-dashboard=true",
    ]
    if node_types is not None:
        (folder / "autoscaler.yaml").write_text(json.dumps(_autoscaler(node_types, gcs_address=f"127.0.0.1:{port}")))
        options.append(f"--autoscaling-config={folder / 'autoscaler.yaml'}")
        env |= {"RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
        env |= {"RAY_CLOUD_INSTANCE_ID": _HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID}
    # A new folder, since "auto" of a job is the last cluster started in its folder. Paths of sockets in pytest's folder
    # would be too long.
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temporary,
        (folder / "ray.log").open("wb") as log,
    ):
        options.append(f"--temp-dir={temporary}")
        process = subprocess.Popen([*command, *options], env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for(dashboard_port, process)
            yield HeadNode(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard_port}", env, process.pid)
        finally:
            end_session(process)


@contextmanager
def head_with_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HeadNode]:
    """A head of one CPU; the folder has the temporary files of its workers. Jobs of this process use the cluster."""
    folder.mkdir()
    # Ray's sockets need short paths.
    monkeypatch.setenv("RAY_TMPDIR", tempfile.gettempdir())
    monkeypatch.setenv("TMPDIR", str(folder))
    # A node is lost after five failed health checks.
    monkeypatch.setenv("RAY_health_check_period_ms", "1000")
    with head_node(folder, num_cpus=1) as head:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_USAGE_STATS_ENABLED"):
            monkeypatch.setenv(name, head.env[name])
        yield head


@contextmanager
def worker_node(head: HeadNode, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A node of one CPU in a new session; the folder has the temporary files of its workers."""
    folder.mkdir()
    options = [
        f"--address={head.address}",
        "--node-ip-address=127.0.0.1",
        "--num-cpus=1",
        # Nodes of one machine need different ports.
        f"--dashboard-agent-listen-port={free_port()}",
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--include-log-monitor=false",
    ]
    command = [Path(sys.executable).parent / "ray", "start", "--block", *options]
    env = {**head.env, "TMPDIR": str(folder)}
    with (folder / "ray.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            yield process
        finally:
            if process.poll() is None:
                end_session(process)


def lose(node: subprocess.Popen[bytes]) -> None:
    """Kills all processes of the node at once."""
    for process in psutil.process_iter():
        if _session_of(process.pid) == node.pid:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    node.wait()


def _autoscaler(node_types: dict[str, Any], *, gcs_address: str) -> dict[str, Any]:
    """Ray's autoscaler with the provider of Ray's tests, whose nodes are processes."""
    return {
        "cluster_name": "test",
        "max_workers": 8,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": gcs_address,
            "head_node_id": _HEAD_ID,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        # Ray requires each key.
        **{key: [] for key in (*_COMMANDS, "cluster_synced_files", "rsync_exclude", "rsync_filter")},
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        "file_mounts_sync_continuously": False,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 1,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            **node_types,
        },
    }


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "ray start ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError(f"no dashboard on port {port} after {_START_TIMEOUT_S} s")


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Ends all processes of the session: Ray's workers have other process groups, but the same session."""
    members: list[int] = []
    # A head that could not start has already ended.
    with suppress(psutil.NoSuchProcess):
        members = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    members += [other.pid for other in psutil.process_iter() if _session_of(other.pid) == process.pid]
    for pid in set(members):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


class Nodes:
    """A Ray cluster of several nodes on this machine, separate from the cluster of other tests; see ``many_nodes``."""

    def __init__(self, pool: ProcessPoolExecutor, head: dict[str, Any]) -> None:
        self._pool = pool
        self.address: str = pool.submit(_start_cluster, head).result()

    def add(self, **node: Any) -> str:
        """Starts a node, with one CPU by default, and returns its id."""
        return self._pool.submit(_add_node, node).result()

    def remove(self, node_id: str, *, graceful: bool = False) -> None:
        """Ends a node, with SIGKILL or gracefully with SIGTERM."""
        self._pool.submit(_remove_node, node_id, graceful=graceful).result()

    def demands(self) -> list[dict[str, float]]:
        """The bundles of pending placement groups, as an autoscaler sees them."""
        return self._pool.submit(_demands).result()


@contextmanager
def many_nodes(*sizes: dict[str, Any], **head: Any) -> Iterator[tuple[Nodes, list[str]]]:
    """``Nodes`` with a head that runs no task, and the ids of further nodes of these sizes."""
    with driver() as pool:
        try:
            nodes = Nodes(pool, {"num_cpus": 0, "include_dashboard": False, **head})
            yield nodes, [nodes.add(**size) for size in sizes]
        finally:
            pool.submit(_stop_cluster).result()


@contextmanager
def driver() -> Iterator[ProcessPoolExecutor]:
    """A process that is the driver or the owner of a cluster."""
    with pytest.MonkeyPatch.context() as patch:
        # Ray reads it once, when it is imported.
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        pool.submit(os.getpid).result()
    with pool:
        yield pool


# In the owner's process: the cluster, and its nodes by id.
_clusters: list[Any] = []
_nodes: dict[str, Any] = {}


def _start_cluster(head: dict[str, Any]) -> str:
    from ray.cluster_utils import Cluster

    # Ctrl-C ends the tests, and they end the cluster.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _clusters.append(Cluster(initialize_head=True, head_node_args=head))
    return str(_clusters[0].address)


def _add_node(node: dict[str, Any]) -> str:
    added = _clusters[0].add_node(**node)
    _nodes[added.node_id] = added
    return str(added.node_id)


def _remove_node(node_id: str, *, graceful: bool) -> None:
    _clusters[0].remove_node(_nodes.pop(node_id), allow_graceful=graceful)


def _demands() -> list[dict[str, float]]:
    from ray.autoscaler.v2.sdk import get_cluster_status

    waiting = get_cluster_status(_clusters[0].address).resource_demands.placement_group_demand
    return [item.bundle for demand in waiting for item in demand.bundles_by_count for _ in range(item.count)]


def _stop_cluster() -> None:
    for cluster in _clusters:
        cluster.shutdown()
