"""Manifests and schemas: KubeRay's published CRDs, Kubernetes' schemas, and one written for Prometheus' operator."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
_CRDS = ROOT.parent / "shared" / "reference" / "kuberay"
_CUSTOM = {"RayJob": "ray.io_rayjobs.yaml", "RayCluster": "ray.io_rayclusters.yaml"}
JOBS = ("rayjob-build", "rayjob-train", "rayjob-distill")
CLUSTERS = (*JOBS, "raycluster-dev")

Document = dict[str, Any]


def _object(**properties: Document) -> Document:
    """The schema of an object with exactly these fields."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_LABELS = {"type": "object", "additionalProperties": {"type": "string"}, "minProperties": 1}
_NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
# By hand, from the operator's CRD of 0.93.
_POD_MONITOR = _object(
    apiVersion={"const": "monitoring.coreos.com/v1"},
    kind={"const": "PodMonitor"},
    metadata=_object(name=_NAME, namespace=_NAME, labels=_LABELS),
    spec=_object(
        selector=_object(matchLabels=_LABELS),
        podMetricsEndpoints={
            "type": "array",
            "items": _object(port=_NAME, interval={"type": "string", "pattern": r"^([0-9]+m)?([0-9]+s)?$"}),
        },
    ),
)


class _OnceLoader(yaml.SafeLoader):
    """Refuses duplicate keys, of which YAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if len(names) > len(set(names)):
            raise yaml.constructor.ConstructorError(None, None, "a duplicate key", node.start_mark)
        return super().construct_mapping(node, deep)


def load(path: Path) -> list[Document]:
    return list(yaml.load_all(path.read_text(), _OnceLoader))


def manifest(name: str) -> Document:
    (document,) = load(INFRA / "kuberay" / f"{name}.yaml")
    return document


def closed(schema: Any) -> Any:
    """An ``openAPIV3Schema`` as a JSON schema that refuses the fields that an API server silently drops."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: closed(part) for name, part in schema.items() if name != "properties"}
    if "properties" in schema:
        strict["properties"] = {name: closed(part) for name, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            strict.setdefault("additionalProperties", False)
    return strict


@functools.cache
def _validator(kind: str) -> jsonschema.Draft202012Validator:
    if kind == "PodMonitor":
        return jsonschema.Draft202012Validator(_POD_MONITOR)
    path = _CRDS / _CUSTOM[kind]
    if not path.exists():
        pytest.skip(f"KubeRay's CRDs are not in {_CRDS}")
    versions = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]["versions"]
    (schema,) = [version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1"]
    spec = schema["properties"]["spec"]["properties"]
    cluster = spec["rayClusterSpec"]["properties"] if kind == "RayJob" else spec
    # The CRD leaves an object's own metadata to Kubernetes; a pod's has the same fields.
    schema["properties"]["metadata"] = cluster["headGroupSpec"]["properties"]["template"]["properties"]["metadata"]
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    schema["properties"]["apiVersion"] = {"const": "ray.io/v1"}
    return jsonschema.Draft202012Validator(closed(schema))


def schema_error(document: Document) -> str | None:
    """The first error of a manifest, or None."""
    if not isinstance(document.get("kind"), str) or not isinstance(document.get("apiVersion"), str):
        return "$: no kind or apiVersion"
    if document["kind"] in {*_CUSTOM, "PodMonitor"}:
        error = next(_validator(document["kind"]).iter_errors(document), None)
        return None if error is None else f"{error.json_path}: {error.message}"
    try:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        return str(error)
    return None


@dataclass(frozen=True, slots=True)
class Pod:
    """One pod template of a RayJob or a RayCluster."""

    name: str
    labels: dict[str, str]
    spec: dict[str, Any]

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec["containers"], *self.spec.get("initContainers", [])]


def cluster_spec(document: Document) -> dict[str, Any]:
    spec: dict[str, Any] = document["spec"]
    return spec.get("rayClusterSpec", spec)


def pods(document: Document) -> Iterator[Pod]:
    cluster = cluster_spec(document)
    templates = {"head": cluster["headGroupSpec"]["template"]}
    templates |= {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    if "submitterPodTemplate" in document["spec"]:
        templates["submitter"] = document["spec"]["submitterPodTemplate"]
    for name, template in templates.items():
        yield Pod(name, template["metadata"]["labels"], template["spec"])
