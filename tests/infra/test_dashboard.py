"""The dashboard and its scrape targets; its queries are checked in tests/jobs/observability/test_ray_metrics.py."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

import yaml

from tests.infra.manifests import CLUSTERS, INFRA, manifest, pods

DASHBOARD: dict[str, Any] = json.loads((INFRA / "grafana" / "stillroom.json").read_text())
PANELS = DASHBOARD["panels"]


def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
    at = panel["gridPos"]
    return {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}


def test_panels_have_different_ids_and_places_on_the_grid() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    assert all(x < 24 for panel in PANELS for x, _ in cells(panel))
    assert not any(cells(first) & cells(second) for first, second in combinations(PANELS, 2))


def test_every_panel_has_a_description_and_a_unit() -> None:
    for panel in PANELS:
        if panel["type"] != "row":
            assert panel["description"].endswith("."), panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]


def test_every_variable_is_defined_and_used() -> None:
    names = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert names == {"datasource", "cache", "run", "window"}
    text = json.dumps(PANELS)
    for name in names:
        assert f"${name}" in text or f"${{{name}}}" in text


def test_prometheus_finds_the_pods_at_a_port_that_the_policy_opens() -> None:
    (job,) = yaml.safe_load((INFRA / "grafana" / "prometheus.yaml").read_text())["scrape_configs"]
    (discovery,) = job["kubernetes_sd_configs"]
    rules = {tuple(rule["source_labels"]): rule for rule in job["relabel_configs"]}
    policy = manifest("network-policy")
    assert discovery["namespaces"]["names"] == [policy["metadata"]["namespace"]]
    project = rules["__meta_kubernetes_pod_label_project",]["regex"]
    port_name = rules["__meta_kubernetes_pod_container_port_name",]["regex"]
    ingress = [rule for rule in policy["spec"]["ingress"] if "monitoring" in json.dumps(rule)]
    opened = {port["port"] for rule in ingress for port in rule["ports"]}
    for name in CLUSTERS:
        head = next(pod for pod in pods(manifest(name)) if pod.name == "head")
        assert head.labels["project"] == project
        (port,) = [port for port in head.containers[0]["ports"] if port["name"] == port_name]
        assert port["containerPort"] in opened
    # The monitor of the operator selects the same targets.
    monitor = manifest("pod-monitor")
    assert monitor["metadata"]["namespace"] == policy["metadata"]["namespace"]
    assert monitor["spec"] == {
        "selector": {"matchLabels": {"project": project}},
        "podMetricsEndpoints": [{"port": port_name, "interval": job["scrape_interval"]}],
    }
