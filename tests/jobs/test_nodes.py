"""Tasks on several nodes: placement, late nodes and lost nodes."""

from __future__ import annotations

import contextlib
import json
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray

from jobs.index_shards import index_shards
from jobs.ray.fan_out import fan_out
from jobs.ray.task_scheduler import LostTaskError
from pipeline.core.errors import ResourceError
from schemas.config import RayConfig
from tests.errors import raises
from tests.jobs.clusters import Nodes, driver, many_nodes
from tests.jobs.conftest import Tree, config_of
from tests.jobs.node_work import attempts, node, wait_for_go
from tests.waiting import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]
_TIMEOUT_S = 60


class Cluster:
    """Two nodes of two CPUs, one with a simulated GPU, the other with a resource ``spot``."""

    def __init__(self, nodes: Nodes, ids: list[str], pool: ProcessPoolExecutor) -> None:
        self.nodes, self.pool = nodes, pool
        self.spot, self.gpu = ids

    def submit(self, work: Callable[[int], Any], num: int, log: Path, **keys: Any) -> Future[list[Any]]:
        return self.pool.submit(_drive, work, num, {"address": self.nodes.address, **keys}, log)

    def run(self, work: Callable[[int], Any], num: int, log: Path, **keys: Any) -> list[Any]:
        return self.submit(work, num, log, **keys).result(_TIMEOUT_S)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        # The logs of drivers and workers are JSON.
        patch.setenv("STILLROOM_LOG", "json")
        with (
            many_nodes({"num_cpus": 2, "resources": {"spot": 1}}, {"num_cpus": 2, "num_gpus": 1}) as (nodes, ids),
            driver() as pool,
        ):
            # One job for all tests, so that they share workers.
            pool.submit(partial(ray.init, nodes.address, log_to_driver=False)).result()
            yield Cluster(nodes, ids, pool)


@pytest.fixture
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("driver") / "log"


def _drive(work: Callable[[int], Any], num: int, keys: dict[str, Any], log: Path) -> list[Any]:
    """Results in the order of the numbers; the driver's standard error goes to ``log``."""
    with log.open("w", buffering=1) as sink, contextlib.redirect_stderr(sink):
        results = dict(fan_out(work, range(num), RayConfig(**keys), what="a part"))
    return [results[number] for number in range(num)]


def _worker_logs() -> str:
    folder = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    return "\n".join(path.read_text() for path in folder.glob("worker-*.err"))


def nodes_by_item(log: str, event: str) -> dict[str, str]:
    events = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return {item["item"]: item["node"] for item in events if item["event"] == event}


def test_parts_that_one_node_could_run_are_spread_over_all_nodes_and_logged_with_their_nodes(
    cluster: Cluster, log: Path
) -> None:
    results = cluster.run(partial(node, 0.5), 2, log)
    assert set(results) == {cluster.spot, cluster.gpu}
    names = {str(number): f"{platform.node()}:{node_id[:8]}" for number, node_id in enumerate(results)}
    assert nodes_by_item(log.read_text(), "done") == names
    # This is the first test, so the workers have logged nothing else.
    workers = cluster.pool.submit(_worker_logs).result()
    assert nodes_by_item(workers, "began") == nodes_by_item(workers, "ended") == names


def test_parts_run_on_nodes_with_the_gpus_or_custom_resources_they_need(cluster: Cluster, log: Path) -> None:
    assert set(cluster.run(partial(node, 0), 6, log, gpus_per_task=0.5)) == {cluster.gpu}
    assert set(cluster.run(partial(node, 0), 6, log, resources_per_task={"spot": 0.5})) == {cluster.spot}


def test_indexing_needs_no_gpu(cluster: Cluster, tree: Tree, log: Path, tmp_path: Path) -> None:
    keys = {"address": cluster.nodes.address, "gpus_per_task": 8, "resources_per_task": {"nowhere": 1}}
    config = config_of(tree(ray=keys))
    assert cluster.pool.submit(index_shards, config, str(tmp_path / "index")).result(_TIMEOUT_S) == 96
    with pytest.raises(ResourceError):
        cluster.run(partial(node, 0), 1, log, **keys)


def test_a_task_must_fit_on_a_single_node(cluster: Cluster, log: Path) -> None:
    with raises("ray.too-few-resources", ResourceError, expected="3 CPU") as caught:
        cluster.run(partial(node, 0), 1, log, cpus_per_task=3)
    # The head of the cluster is a node without CPUs.
    assert "2 nodes with 2 CPU" in str(caught.value.got)


def test_a_node_that_joins_later_is_filled_with_tasks(cluster: Cluster, log: Path, tmp_path: Path) -> None:
    future = cluster.submit(partial(wait_for_go, tmp_path), 24, log)
    wait_until(lambda: len(attempts(tmp_path)) == 4, timeout_s=_TIMEOUT_S)
    late = cluster.nodes.add(num_cpus=3)
    wait_until(lambda: len(attempts(tmp_path)) == 7, timeout_s=_TIMEOUT_S)
    assert Counter(node for _, node in attempts(tmp_path)) == {cluster.spot: 2, cluster.gpu: 2, late: 3}
    (tmp_path / "go").touch()
    assert len(future.result(_TIMEOUT_S)) == 24
    cluster.nodes.remove(late)


def test_a_start_waits_for_a_node_of_an_autoscaler(cluster: Cluster, log: Path) -> None:
    future = cluster.submit(partial(node, 0), 3, log, resources_per_task={"late": 1}, wait_s=_TIMEOUT_S)
    wait_until(lambda: cluster.nodes.demands() == [{"CPU": 1.0, "late": 1.0}], timeout_s=_TIMEOUT_S)
    late = cluster.nodes.add(resources={"late": 1})
    assert future.result(_TIMEOUT_S) == [late] * 3
    assert "waiting up to 60 s for nodes: a part needs 1 CPU, 1 late" in log.read_text()
    assert cluster.nodes.demands() == []
    cluster.nodes.remove(late)


def test_a_start_that_timed_out_names_the_resources_and_withdraws_its_demand(cluster: Cluster, log: Path) -> None:
    with raises("ray.too-few-resources", ResourceError, expected="1 CPU, 2 GPU") as caught:
        cluster.run(partial(node, 0), 1, log, gpus_per_task=2, wait_s=1)
    assert "after 1 s" in caught.value.what
    assert cluster.nodes.demands() == []


@pytest.mark.parametrize("graceful", [True, False], ids=["SIGTERM", "SIGKILL"])
def test_a_lost_node_costs_the_tasks_that_ran_on_it_alone(
    graceful: bool, cluster: Cluster, log: Path, tmp_path: Path
) -> None:
    lost = cluster.nodes.add(num_cpus=2)
    future = cluster.submit(partial(wait_for_go, tmp_path), 12, log)
    wait_until(lambda: len(attempts(tmp_path)) == 6, timeout_s=_TIMEOUT_S)
    ran_there = {number for number, node in attempts(tmp_path) if node == lost}
    cluster.nodes.remove(lost, graceful=graceful)
    (tmp_path / "go").touch()
    assert lost not in future.result(_TIMEOUT_S)
    assert len(ran_there) == 2
    assert Counter(number for number, _ in attempts(tmp_path)) == {n: 1 + (n in ran_there) for n in range(12)}
    text = log.read_text()
    assert "retried: 2 after NodeDiedError" in text
    assert text.count(f"attempt 1 failed on {platform.node()}:{lost[:8]} (NodeDiedError)") == 2


def test_tasks_wait_for_lost_nodes_to_come_back(cluster: Cluster, log: Path, tmp_path: Path) -> None:
    first = cluster.nodes.add(resources={"fleet": 1})
    future = cluster.submit(partial(wait_for_go, tmp_path), 2, log, resources_per_task={"fleet": 1})
    wait_until(lambda: len(attempts(tmp_path)) == 1, timeout_s=_TIMEOUT_S)
    cluster.nodes.remove(first, graceful=True)
    wait_until(
        lambda: "no node is left for a part (1 CPU, 1 fleet); waiting up to 300 s" in log.read_text(),
        timeout_s=_TIMEOUT_S,
    )
    second = cluster.nodes.add(resources={"fleet": 1})
    (tmp_path / "go").touch()
    assert future.result(_TIMEOUT_S) == [second] * 2
    cluster.nodes.remove(second)


@pytest.mark.exhaustive
def test_nodes_that_do_not_come_back_end_the_work(cluster: Cluster, log: Path, tmp_path: Path) -> None:
    lost = cluster.nodes.add(resources={"spot-only": 1})
    future = cluster.submit(partial(wait_for_go, tmp_path), 3, log, resources_per_task={"spot-only": 1}, wait_s=1)
    wait_until(lambda: len(attempts(tmp_path)) == 1, timeout_s=_TIMEOUT_S)
    cluster.nodes.remove(lost)
    with raises("ray.nodes-gone", LostTaskError, got="none for 1 s"):
        future.result(_TIMEOUT_S)
    assert "waiting up to 1 s" in log.read_text()


@pytest.mark.exhaustive
def test_a_job_whose_environment_cannot_be_set_up_reports_the_cause(cluster: Cluster, log: Path) -> None:
    nowhere = {"working_dir": "local:///nowhere-at-all"}
    with driver() as pool:
        pool.submit(partial(ray.init, cluster.nodes.address, log_to_driver=False, runtime_env=nowhere)).result()
        future = pool.submit(_drive, partial(node, 0), 1, {"address": cluster.nodes.address, "max_retries": 0}, log)
        with raises("ray.task-lost", LostTaskError) as caught:
            future.result(_TIMEOUT_S)
    assert "RuntimeEnvSetupError: " in str(caught.value.got)
    assert "nowhere-at-all" in str(caught.value.got)
    assert "working directory or requirements" in str(caught.value.next_step)
    assert "batch_size" not in str(caught.value)
