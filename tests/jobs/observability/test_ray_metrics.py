"""Ray metrics of a job as Prometheus scrapes them, and the queries of the dashboard."""

from __future__ import annotations

import json
import platform
import re
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from ray.dashboard.modules.reporter.reporter_agent import GPU_TAG_KEYS, METRICS_GAUGES
from ray.util import metrics

from jobs.build_cache import build_cache
from jobs.observability import ray_metrics
from jobs.observability.build_observer import BuildObserver
from jobs.observability.task_observer import AttemptStats
from jobs.train_student import train_student
from pipeline.cache.build.part import PartTask
from pipeline.core.errors import ShardError, TransientStorageError
from pipeline.student.evaluation.metrics import metrics_of
from schemas.cache_format import ViewBlock
from schemas.config import Config
from tests.docs.pages import gauges_of_tasks, ray_meters
from tests.jobs.conftest import Tree, config_of

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[3]
DASHBOARD = ROOT / "infra" / "grafana" / "stillroom.json"
METRICS = ray_meters()
_SERIES = re.compile(r"(\w+)\{(.*)\} (\S+)")
_WAIT_S = 60

Series = dict[str, list[tuple[dict[str, str], float]]]


def scrape() -> Series:
    """The page of this node that Prometheus scrapes: the labels and value of each series, by name."""
    (node,) = ray.nodes()
    with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    series: Series = {}
    for name, labels, value in filter(None, (match and match.groups() for match in map(_SERIES.fullmatch, lines))):
        series.setdefault(name, []).append((dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)))
    return series


def wait_for(metric: ray_metrics.Counter, names: set[str], **labels: str) -> Series:
    """Waits for a page with this series, and so with all that was recorded before it, and with these names."""
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline:
        series = scrape()
        is_recorded = any(labels.items() <= seen.items() for seen, _ in series.get(metric.exported, []))
        if is_recorded and names <= series.keys():
            return series
        time.sleep(0.3)
    raise TimeoutError(f"no {metric.exported} with {labels}, or none of {names - series.keys()}, after {_WAIT_S} s")


@dataclass(frozen=True, slots=True)
class Query:
    """One query of the dashboard to Prometheus."""

    place: str
    query: str
    legend: str

    @property
    def names(self) -> set[str]:
        return set(re.findall(r"\bray_\w+", self.query))

    @property
    def labels(self) -> set[str]:
        grouped = {label for group in re.findall(r"by \(([^)]*)\)", self.query) for label in group.split(", ")}
        # A legend of other labels would be empty.
        assert set(re.findall(r"{{(\w+)}}", self.legend)) <= grouped, self.place
        return grouped | set(re.findall(r"[{,]\s*(\w+)\s*[=!]", self.query))


def queries() -> list[Query]:
    dashboard = json.loads(DASHBOARD.read_text())
    choices = [item for item in dashboard["templating"]["list"] if item["type"] == "query"]
    # label_values(METRIC, LABEL) as a selection by that label.
    variables = {
        item["name"]: re.sub(r"label_values\((\w+), (\w+)\)", r'\1{\2=""}', item["query"]["query"]) for item in choices
    }
    return [Query(name, query, "") for name, query in variables.items()] + [
        Query(f"{panel['title']} {target['refId']}", target["expr"], target["legendFormat"])
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    ]


# Without a GPU, Ray exports no metrics of GPUs; these are their names in Ray.
GPU_METRICS = {f"ray_{name}" for name in METRICS_GAUGES if name.startswith(("node_gpu", "node_gram"))}


@pytest.mark.usefixtures("ray_cluster")
def test_every_metric_is_exported_and_every_query_of_the_dashboard_has_a_result(tree: Tree, tmp_path: Path) -> None:
    # For Ray's metrics of tasks. The jobs below run in this process, which is a driver of the cluster.
    ray.get(ray.remote(platform.node).remote())
    config = config_of(tree(cache={"url": str(tmp_path / "metered")}))
    manifest = build_cache(config)
    train_student(config_of(tree(teacher={"mode": "online"}, run={"url": str(tmp_path / "metered-run")})))
    task = PartTask(config, config.data.shards[0], ViewBlock(start=0, stop=2))
    observer = BuildObserver(config, [task], num_shards=4)
    observer.retried(
        task, TransientStorageError("slow down"), AttemptStats("left", 1), attempt=1, kind="storage", pause_s=1
    )
    observer.failed(task, ShardError("cut"), AttemptStats("left", 1), attempt=2)

    queried = {name for query in queries() for name in query.names}
    series = wait_for(ray_metrics.PARTS_FAILED, queried - GPU_METRICS, cache="metered")
    for metric in METRICS:
        (labels, _), *_ = series[metric.exported]
        assert set(metric.tags) <= labels.keys(), metric.name
    exported = {name for name in series if name.startswith("ray_stillroom_")}
    assert exported == {metric.exported for metric in METRICS}

    def total(metric: ray_metrics.Counter | ray_metrics.Gauge, **expected: str) -> float:
        return sum(value for labels, value in series[metric.exported] if expected.items() <= labels.items())

    cache = {"cache": "metered"}
    assert total(ray_metrics.IMAGES, **cache) == 4 * 24 * (3 + 1)
    assert total(ray_metrics.PARTS_DONE, **cache) == 12
    assert total(ray_metrics.BYTES, **cache) == manifest.size_bytes
    assert 0 < total(ray_metrics.TEACHER_SECONDS, **cache) <= total(ray_metrics.TASK_SECONDS, **cache)
    retried = total(ray_metrics.PARTS_RETRIED, kind="storage", **cache)
    assert (retried, total(ray_metrics.PARTS_FAILED, **cache)) == (1, 1)
    run = {"run": "metered-run"}
    assert (
        total(ray_metrics.STEP, **run),
        total(ray_metrics.TOTAL_STEPS, **run),
        total(ray_metrics.STARTS, **run),
    ) == (8, 8, 1)
    gauges = ray_metrics.evaluation_gauges(metrics_of(Config().data))
    assert 0 <= total(gauges["top1"], **run) <= total(gauges["top5"], **run) <= 1

    for query in queries():
        assert query.names, query.place
        for name in query.names:
            labels = set(GPU_TAG_KEYS) if name in GPU_METRICS else series[name][0][0].keys()
            assert query.labels <= labels, f"{query.place}: {name}"
    assert exported <= queried


def test_without_ray_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(metrics, "Counter", lambda *_: pytest.fail("it was recorded"))
    monkeypatch.setattr(metrics, "Gauge", lambda *_: pytest.fail("it was recorded"))
    ray_metrics.IMAGES.add(1, cache="a", node="b")
    ray_metrics.LOSS.set(1.0, run="a")


def test_the_document_has_every_metric_with_its_labels_and_its_meaning() -> None:
    text = (ROOT / "docs" / "how-to" / "watch.md").read_text()
    rows = re.findall(r"^\| `(ray_stillroom_\w+)` \| ([^|]*) \| (.*) \|$", text, re.MULTILINE)
    meters = [*METRICS, *gauges_of_tasks()]
    assert rows == [(metric.exported, ", ".join(f"`{tag}`" for tag in metric.tags), metric.text) for metric in meters]
