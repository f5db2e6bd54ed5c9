"""Two nodes on one machine: a log tells them apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.fan_out import fan_out
from jobs.ray_runtime import node_name
from schemas.config import RayConfig

pytestmark = [pytest.mark.ray, pytest.mark.slow]
_PATIENCE_S = 60


class Meeting:
    """A task of each node, which does not end before the other has begun."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def __call__(self, number: int) -> str:
        (self.folder / str(number)).touch()
        deadline = time.monotonic() + _PATIENCE_S
        while len(list(self.folder.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        return node_name()


def main(folder: str) -> None:
    """Prints each item with the node that ran it, as the task itself saw it."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        print(json.dumps(dict(fan_out(Meeting(folder), [1, 2], RayConfig(address="auto"), what="a meeting"))))
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_the_log_names_for_each_task_the_node_that_ran_it(tmp_path: Path) -> None:
    # A process of its own: this one is the driver of another cluster.
    env = {**os.environ, "STILLROOM_LOG": "json", "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.jobs.test_nodes_in_logs", str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=150,
        check=True,
    )
    ran = json.loads(done.stdout.splitlines()[-1])
    told = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert {item["item"]: item["node"] for item in told if item["event"] == "done"} == ran
    assert len(set(ran.values())) == 2


if __name__ == "__main__":
    main(sys.argv[1])
