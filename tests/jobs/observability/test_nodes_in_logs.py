"""A log distinguishes two nodes on one machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.ray.cluster import node_name
from jobs.ray.fan_out import fan_out
from schemas.config import RayConfig

pytestmark = [pytest.mark.ray, pytest.mark.slow]
_TIMEOUT_S = 60


class Meeting:
    """Two tasks, neither of which ends before the other has begun, so that each node runs one."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def __call__(self, number: int) -> str:
        (self.folder / str(number)).touch()
        deadline = time.monotonic() + _TIMEOUT_S
        while len(list(self.folder.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        return node_name()


def main(folder: str) -> None:
    """Prints each item with the node that ran it, as the task reported it."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        ran = dict(fan_out(Meeting(folder), [1, 2], RayConfig(address="auto"), what="a meeting"))
        logs = Path(cluster.head_node.get_logs_dir_path()).glob("worker-*.err")
        print(json.dumps({"ran": ran, "workers": [line for log in logs for line in log.read_text().splitlines()]}))
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_the_log_names_for_each_task_the_node_that_ran_it(tmp_path: Path) -> None:
    # In another process: this one is the driver of another cluster.
    env = {**os.environ, "STILLROOM_LOG": "json", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.jobs.observability.test_nodes_in_logs", str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=150,
        check=True,
    )
    output = json.loads(done.stdout.splitlines()[-1])
    ran = output["ran"]
    events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert {item["item"]: item["node"] for item in events if item["event"] == "done"} == ran
    assert len(set(ran.values())) == 2
    # The logs of the workers have the same form.
    worker_events = [json.loads(line) for line in output["workers"] if line.startswith("{")]
    for event in ("began", "ended"):
        assert {item["item"]: item["node"] for item in worker_events if item["event"] == event} == ran
    assert [item["attempt"] for item in worker_events] == [1] * 4


if __name__ == "__main__":
    main(sys.argv[1])
