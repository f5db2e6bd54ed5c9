"""Every manifest against the rules of the API server, KubeRay's operator and a namespace with restricted pods."""

from __future__ import annotations

import copy
import ipaddress
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS
from ray.scripts.scripts import start

from tests.infra.manifests import CLUSTERS, INFRA, JOBS, Document, Pod, cluster_spec, load, manifest, pods, schema_error

FILES = sorted((INFRA / "kuberay").glob("*.yaml"))
# Maps with arbitrary keys, which no schema checks, but tests below.
_FREE = {"annotations", "labels", "limits", "matchLabels", "rayStartParams", "requests"}
_SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN|://[^/\s]*:[^/\s]*@|(?:password|secret|token|key)\w*\s*[:=]\s*[\"']?[\w/+=-]{16}|"
    r"\b[0-9a-fA-F]{32,}\b|\b(?=[A-Za-z+/]*\d)[A-Za-z0-9+/]{40,}={0,2}",
    re.IGNORECASE,
)


def documents() -> list[Any]:
    return [pytest.param(document, id=f"{path.stem}-{document['kind']}") for path in FILES for document in load(path)]


@pytest.fixture(params=CLUSTERS)
def cluster(request: pytest.FixtureRequest) -> Document:
    return manifest(request.param)


def test_every_file_of_the_folder_is_tested_here() -> None:
    assert {path.stem for path in FILES} == {*CLUSTERS, "namespace", "network-policy", "pod-monitor"}


@pytest.mark.slow
@pytest.mark.parametrize("document", documents())
def test_a_manifest_matches_its_schema(document: Document) -> None:
    assert schema_error(document) is None


@pytest.mark.slow
@pytest.mark.parametrize("document", documents())
def test_every_misspelled_key_and_every_value_of_another_type_is_refused(document: Document) -> None:
    # A copy without YAML's aliases, so that a change affects one place.
    document = json.loads(json.dumps(document))
    unnoticed = {path[-2] for path in _keys(document) if schema_error(_misspelled(document, path)) is None}
    assert unnoticed <= _FREE
    leaves = [path for path, value in _places(document) if not isinstance(value, dict | list)]
    assert [path for path in leaves if schema_error(_replaced(document, path, [{"no": "such"}])) is None] == []


def test_a_duplicate_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("kind: RayJob\nspec: {}\nspec: {}\n")
    with pytest.raises(yaml.YAMLError, match="duplicate key"):
        load(path)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    pairs: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in pairs:
        yield (*path, name), inner
        yield from _places(inner, (*path, name))


def _keys(document: Document) -> list[tuple[Any, ...]]:
    return [path for path, _ in _places(document) if isinstance(path[-1], str)]


def _replaced(document: Document, path: tuple[Any, ...], value: Any) -> Document:
    document = copy.deepcopy(document)
    _parent(document, path)[path[-1]] = value
    return document


def _misspelled(document: Document, path: tuple[Any, ...]) -> Document:
    document = copy.deepcopy(document)
    parent = _parent(document, path)
    parent[f"{path[-1]}x"] = parent.pop(path[-1])
    return document


def _parent(document: Document, path: tuple[Any, ...]) -> Any:
    inner: Any = document
    for name in path[:-1]:
        inner = inner[name]
    return inner


@pytest.mark.parametrize("name", JOBS)
def test_a_job_ends_its_cluster_and_has_a_deadline(name: str) -> None:
    spec = manifest(name)["spec"]
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["activeDeadlineSeconds"] > 0
    # The CRD accepts any text here.
    assert spec["submissionMode"] in {"K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"}


def test_names_leave_room_for_the_suffixes_of_the_operator(cluster: Document) -> None:
    # 63 characters of a label, less the suffixes of KubeRay.
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?", cluster["metadata"]["name"])
    groups = [group["groupName"] for group in cluster_spec(cluster)["workerGroupSpecs"]]
    assert len(groups) == len(set(groups))


def test_autoscaler_v2_starts_pods_within_bounds_that_never_restart(cluster: Document) -> None:
    spec = cluster_spec(cluster)
    assert spec["enableInTreeAutoscaling"]
    assert spec["autoscalerOptions"]["version"] == "v2"
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert {pod.spec["restartPolicy"] for pod in pods(cluster)} == {"Never"}


def test_a_cluster_has_a_token_and_a_ray_that_supports_tokens(cluster: Document) -> None:
    spec = cluster_spec(cluster)
    # Without a name the operator creates a random token; no pod disables it.
    assert spec["authOptions"] == {"mode": "token"}
    assert tuple(map(int, spec["rayVersion"].split("."))) >= (2, 52, 0)
    assert not any("env" in container for pod in pods(cluster) for container in pod.containers)


def test_start_parameters_are_options_of_ray_start_and_text(cluster: Document) -> None:
    spec = cluster_spec(cluster)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    given = {name: value for group in groups for name, value in group["rayStartParams"].items()}
    assert isinstance(start, click.Command)
    assert {f"--{name}" for name in given} <= {option for param in start.params for option in param.opts}
    assert all(isinstance(value, str) for value in given.values())
    # The head has no resources for tasks.
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_every_container_has_requests_equal_to_its_limits(cluster: Document) -> None:
    of_pods = [container["resources"] for pod in pods(cluster) for container in pod.containers]
    for resources in [*of_pods, cluster_spec(cluster)["autoscalerOptions"]["resources"]]:
        requests, limits = resources["requests"], resources["limits"]
        assert {"cpu", "memory"} <= requests.keys() == limits.keys()
        assert limits.keys() <= {"cpu", "memory", "ephemeral-storage", "nvidia.com/gpu"}
        # Ray counts limits, and Kubernetes places pods by requests.
        assert all(requests[name] == limits[name] for name in requests if name != "ephemeral-storage")


def test_a_restricted_namespace_admits_the_pods(cluster: Document) -> None:
    (namespace,) = [
        document for document in load(INFRA / "kuberay" / "namespace.yaml") if document["kind"] == "Namespace"
    ]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    contexts = [cluster_spec(cluster)["autoscalerOptions"]["securityContext"]]
    for pod in pods(cluster):
        user = pod.spec["securityContext"]
        assert user["runAsNonRoot"]
        assert user["runAsUser"] > 0
        assert user["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not pod.spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        assert all(volume.keys() <= {"name", "configMap", "emptyDir"} for volume in pod.spec.get("volumes", []))
        contexts += [container["securityContext"] for container in pod.containers]
    for context in contexts:
        assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_only_the_head_has_a_token_of_the_api_server(cluster: Document) -> None:
    for pod in pods(cluster):
        assert pod.spec.get("automountServiceAccountToken", True) == (pod.name == "head")


def test_mounts_name_volumes_and_the_generated_config_map(cluster: Document) -> None:
    (kustomization,) = load(INFRA / "kustomization.yaml")
    assert kustomization["generatorOptions"] == {"disableNameSuffixHash": True}
    generated = {entry["name"] for entry in kustomization["configMapGenerator"]}
    for pod in pods(cluster):
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        mounted = {mount["name"] for container in pod.containers for mount in container.get("volumeMounts", [])}
        assert mounted == volumes.keys()
        assert {volume["configMap"]["name"] for volume in volumes.values() if "configMap" in volume} <= generated


def test_the_store_s_keys_come_from_a_role_or_a_secret(cluster: Document) -> None:
    accounts = [entry["metadata"]["name"] for entry in load(INFRA / "kuberay" / "namespace.yaml")[1:]]
    for pod in pods(cluster):
        if pod.name != "submitter":
            assert [pod.spec["serviceAccountName"]] == accounts
            (container,) = pod.containers
            assert container["envFrom"] == [{"secretRef": {"name": "stillroom-store", "optional": True}}]


@pytest.mark.parametrize(
    "path", sorted(path for path in INFRA.rglob("*") if path.is_file()), ids=lambda path: path.name
)
def test_no_file_contains_a_secret(path: Path) -> None:
    assert [match[0] for match in _SECRET.finditer(path.read_text())] == []
    if path.suffix == ".yaml":
        assert all(document.get("kind") != "Secret" for document in load(path))


@pytest.mark.parametrize(
    "text",
    [
        "AKIAIOSFODNN7EXAMPLE",
        "aws_secret_access_key: wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        "-----BEGIN RSA PRIVATE KEY-----",
        "s3://user:pass@bucket/x",
        "auth_token: 0123456789abcdef0123456789abcdef",
    ],
)
def test_the_pattern_of_secrets_matches_secrets(text: str) -> None:
    assert _SECRET.search(text)


def test_probes_use_paths_of_ray_without_a_token(cluster: Document) -> None:
    (port,) = [param.default for param in start.params if param.name == "dashboard_agent_listen_port"]
    for pod in pods(cluster):
        if pod.name != "submitter":
            (container,) = pod.containers
            for kind in ("readinessProbe", "livenessProbe"):
                probe = container[kind]["httpGet"]
                assert probe["path"] in PUBLIC_EXACT_PATHS
                assert probe["port"] == port


def _terms(pod: Pod) -> list[dict[str, Any]]:
    """Every list of requirements on a node's labels, required or preferred. All requirements of a list must hold."""
    affinity = pod.spec["affinity"]["nodeAffinity"]
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [])
    preferred = affinity.get("preferredDuringSchedulingIgnoredDuringExecution", [])
    return [*required, *(entry["preference"] for entry in preferred)]


def _holds(term: dict[str, Any], labels: dict[str, str]) -> bool:
    for rule in term["matchExpressions"]:
        value = labels.get(rule["key"])
        holds = {
            "In": value in rule.get("values", []),
            "NotIn": value not in rule.get("values", []),
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }
        if not holds[rule["operator"]]:
            return False
    return True


# The labels of spot nodes of GKE, EKS, Karpenter and AKS.
SPOT = (
    {"cloud.google.com/gke-spot": "true"},
    {"eks.amazonaws.com/capacityType": "SPOT"},
    {"karpenter.sh/capacity-type": "spot"},
    {"kubernetes.azure.com/scalesetpriority": "spot"},
)
ON_DEMAND = ({}, {"eks.amazonaws.com/capacityType": "ON_DEMAND"}, {"karpenter.sh/capacity-type": "on-demand"})


@pytest.mark.parametrize(
    ("name", "wants_spot"), [("rayjob-build", True), ("rayjob-train", False), ("rayjob-distill", True)]
)
def test_heads_avoid_spot_nodes_and_workers_prefer_the_nodes_of_their_job(name: str, wants_spot: bool) -> None:
    head, worker, _ = pods(manifest(name))
    for labels in SPOT:
        assert not any(_holds(term, labels) for term in _terms(head))
        assert any(_holds(term, labels) for term in _terms(worker)) == wants_spot
    for labels in ON_DEMAND:
        assert any(_holds(term, labels) for term in _terms(head))
        assert any(_holds(term, labels) for term in _terms(worker)) != wants_spot


def test_pods_with_a_gpu_tolerate_the_taints_of_gpu_and_spot_nodes(cluster: Document) -> None:
    taints = [
        {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"},
        {"key": "cloud.google.com/gke-spot", "value": "true", "effect": "NoSchedule"},
        {"key": "kubernetes.azure.com/scalesetpriority", "value": "spot", "effect": "NoSchedule"},
    ]
    for pod in pods(cluster):
        if "nvidia.com/gpu" in pod.containers[0]["resources"]["limits"]:
            for taint in taints:
                assert any(_tolerates(rule, taint) for rule in pod.spec["tolerations"]), taint


def _tolerates(rule: dict[str, str], taint: dict[str, str]) -> bool:
    value = rule["operator"] == "Exists" or rule["value"] == taint["value"]
    return rule["key"] == taint["key"] and rule["effect"] == taint["effect"] and value


def test_the_network_policy_applies_to_every_pod(cluster: Document) -> None:
    policy = manifest("network-policy")["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    for pod in pods(cluster):
        assert policy["podSelector"]["matchLabels"].items() <= pod.labels.items()
    open_ports = {port["port"] for rule in policy["ingress"] for port in rule.get("ports", [])}
    head = next(pods(cluster))
    assert open_ports <= {port["containerPort"] for port in head.containers[0]["ports"]}


def test_the_network_policy_opens_neither_ports_to_all_nor_the_metadata_service() -> None:
    policy = manifest("network-policy")["spec"]
    assert all(rule["from"] and all(peer for peer in rule["from"]) for rule in policy["ingress"])
    assert all(rule["to"] and all(peer for peer in rule["to"]) for rule in policy["egress"])
    metadata = ipaddress.ip_address("169.254.169.254")
    blocks = [peer["ipBlock"] for rule in policy["egress"] for peer in rule["to"] if "ipBlock" in peer]
    for block in blocks:
        excepted = any(metadata in ipaddress.ip_network(cidr) for cidr in block.get("except", []))
        assert excepted or metadata not in ipaddress.ip_network(block["cidr"])
