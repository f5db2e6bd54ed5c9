"""What a job records, as Prometheus gets it, and the dashboard's questions to it."""

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

from jobs.build_cache import build_cache
from jobs.observability import ray_metrics
from jobs.observability.build_observer import BuildObserver
from jobs.observability.task_observer import AttemptStats
from jobs.train_student import train_student
from pipeline.cache.build.part import PartTask
from pipeline.core.errors import ShardError, TransientStorageError
from schemas.cache_format import ViewBlock
from tests.jobs.conftest import Tree, config_of

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[3]
DASHBOARD = ROOT / "infra" / "grafana" / "stillroom.json"
METERS = [made for made in vars(ray_metrics).values() if isinstance(made, ray_metrics.Counter | ray_metrics.Gauge)]
_SERIES = re.compile(r"(\w+)\{(.*)\} (\S+)")
_WAIT_S = 60

Series = dict[str, list[tuple[dict[str, str], float]]]


def scrape() -> Series:
    """The page that Prometheus reads of this node: name to labels and value of each series."""
    (node,) = ray.nodes()
    with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found: Series = {}
    for name, labels, value in filter(None, (match and match.groups() for match in map(_SERIES.fullmatch, lines))):
        found.setdefault(name, []).append((dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)))
    return found


def wait_for(meter: ray_metrics.Counter, names: set[str], **labels: str) -> Series:
    """A page with this series on it, and so with all that was recorded before it, and with these names of Ray's."""
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline:
        found = scrape()
        is_there = any(labels.items() <= seen.items() for seen, _ in found.get(meter.exported, []))
        if is_there and names <= found.keys():
            return found
        time.sleep(0.3)
    raise TimeoutError(f"no {meter.exported} with {labels}, or none of {names - found.keys()}, after {_WAIT_S} s")


@dataclass(frozen=True, slots=True)
class Question:
    """What the dashboard asks of Prometheus in one place."""

    place: str
    query: str
    legend: str

    @property
    def names(self) -> set[str]:
        return set(re.findall(r"\bray_\w+", self.query))

    @property
    def labels(self) -> set[str]:
        grouped = {label for group in re.findall(r"by \(([^)]*)\)", self.query) for label in group.split(", ")}
        # Else the legend would be empty: a group has no other labels.
        assert set(re.findall(r"{{(\w+)}}", self.legend)) <= grouped, self.place
        return grouped | set(re.findall(r"[{,]\s*(\w+)\s*[=!]", self.query))


def questions() -> list[Question]:
    dashboard = json.loads(DASHBOARD.read_text())
    choices = [item for item in dashboard["templating"]["list"] if item["type"] == "query"]
    # label_values(METRIC, LABEL), written as a selection by that label.
    chosen = {
        item["name"]: re.sub(r"label_values\((\w+), (\w+)\)", r'\1{\2=""}', item["query"]["query"]) for item in choices
    }
    return [Question(name, query, "") for name, query in chosen.items()] + [
        Question(f"{panel['title']} {target['refId']}", target["expr"], target["legendFormat"])
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    ]


# Where no GPU is, Ray tells nothing of GPUs; these are its own names for it.
GPU_METRICS = {f"ray_{name}" for name in METRICS_GAUGES if name.startswith(("node_gpu", "node_gram"))}


@pytest.mark.usefixtures("ray_cluster")
def test_every_meter_is_exported_and_every_question_of_the_dashboard_has_an_answer(tree: Tree, tmp_path: Path) -> None:
    # For what Ray tells of tasks. All else works in this process, which is a driver of the cluster: workers record
    # nothing, and take long to start.
    ray.get(ray.remote(platform.node).remote())
    config = config_of(tree(cache={"url": str(tmp_path / "metered")}))
    manifest = build_cache(config)
    train_student(config_of(tree(teacher={"mode": "online"}, run={"url": str(tmp_path / "metered-run")})))
    task = PartTask(config, config.data.shards[0], ViewBlock(start=0, stop=2))
    unlucky = BuildObserver(config, [task], num_shards=4)
    unlucky.retried(
        task, TransientStorageError("slow down"), AttemptStats("left", 1), attempt=1, kind="storage", pause_s=1
    )
    unlucky.failed(task, ShardError("cut"), AttemptStats("left", 1), attempt=2)

    asked = {name for question in questions() for name in question.names}
    found = wait_for(ray_metrics.PARTS_FAILED, asked - GPU_METRICS, cache="metered")
    for meter in METERS:
        (labels, _), *_ = found[meter.exported]
        assert set(meter.tags) <= labels.keys(), meter.name
    ours = {name for name in found if name.startswith("ray_stillroom_")}
    assert ours == {meter.exported for meter in METERS}

    def total(meter: ray_metrics.Counter | ray_metrics.Gauge, **expected: str) -> float:
        return sum(value for labels, value in found[meter.exported] if expected.items() <= labels.items())

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
    assert 0 <= total(ray_metrics.TOP1, **run) <= total(ray_metrics.TOP5, **run) <= 1

    for question in questions():
        assert question.names, question.place
        for name in question.names:
            labels = set(GPU_TAG_KEYS) if name in GPU_METRICS else found[name][0][0].keys()
            # A label of one side of a sum is not asked of the other.
            assert question.labels <= labels, f"{question.place}: {name}"
    assert ours <= asked


def test_without_ray_nothing_is_recorded_and_nothing_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(ray_metrics, "_metric", lambda *_: pytest.fail("it was recorded"))
    ray_metrics.IMAGES.add(1, cache="a", node="b")
    ray_metrics.LOSS.set(1.0, run="a")


def test_the_document_has_every_meter_with_its_labels_and_its_meaning() -> None:
    text = (ROOT / "docs" / "how-to" / "watch.md").read_text()
    rows = re.findall(r"^\| `(ray_stillroom_\w+)` \| ([^|]*) \| (.*) \|$", text, re.MULTILINE)
    assert rows == [(meter.exported, ", ".join(f"`{tag}`" for tag in meter.tags), meter.text) for meter in METERS]
