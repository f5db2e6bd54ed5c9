"""The cluster launcher's files against Ray's schema, defaults and command line, and AWS's model of EC2."""

from __future__ import annotations

import copy
import re
from typing import Any

import botocore.session
import botocore.validate
import click
import jsonschema
import pytest
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from pipeline.storage.config_files import load_config
from tests.infra.manifests import INFRA, Document, load, manifest, pods

CLOUDS = ("aws", "gcp")


def launcher(cloud: str) -> Document:
    (document,) = load(INFRA / "launcher" / f"{cloud}.yaml")
    return document


def node_types(cloud: str) -> dict[str, Any]:
    types: dict[str, Any] = launcher(cloud)["available_node_types"]
    return types


def test_every_file_of_the_folder_is_tested_here() -> None:
    assert {path.name for path in (INFRA / "launcher").iterdir()} == {f"{cloud}.yaml" for cloud in CLOUDS}


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_file_matches_ray_s_schema(cloud: str) -> None:
    validate_config(prepare_config(launcher(cloud)))


@pytest.mark.parametrize("cloud", CLOUDS)
def test_every_misspelled_key_is_refused(cloud: str) -> None:
    document = launcher(cloud)
    for name in document:
        wrong = copy.deepcopy(document)
        wrong[f"{name}x"] = wrong.pop(name)
        with pytest.raises((jsonschema.ValidationError, KeyError)):
            validate_config(prepare_config(wrong))
    for kind, node in document["available_node_types"].items():
        for name in node:
            wrong = copy.deepcopy(document)
            wrong["available_node_types"][kind][f"{name}x"] = node[name]
            with pytest.raises(jsonschema.ValidationError):
                validate_config(prepare_config(wrong))


@pytest.mark.parametrize("cloud", CLOUDS)
def test_no_default_of_ray_installs_another_ray(cloud: str) -> None:
    prepared = prepare_config(launcher(cloud))
    steps = [step for name, steps in prepared.items() if name.endswith("_commands") for step in steps]
    assert not [step for step in steps if "pip install" in step]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_is_started_with_valid_options_and_a_dashboard_for_the_head_alone(cloud: str) -> None:
    assert isinstance(start, click.Command)
    for role in ("head", "worker"):
        *_, line = launcher(cloud)[f"{role}_start_ray_commands"]
        _, _, options = line.partition("ray start ")
        parsed = start.make_context("ray start", options.split()).params
        assert parsed["head"] == (role == "head")
        if role == "head":
            assert parsed["dashboard_host"] == "127.0.0.1"
            assert parsed["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
            port = parsed["port"]
        else:
            assert parsed["address"] == f"$RAY_HEAD_IP:{port}"


@pytest.mark.parametrize("cloud", CLOUDS)
def test_every_node_has_the_token_at_ray_s_path_and_the_image_of_the_pods(cloud: str) -> None:
    document = launcher(cloud)
    assert document["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    (image,) = {pod.containers[0]["image"] for pod in pods(manifest("rayjob-build"))}
    assert document["docker"]["image"] == image


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_head_runs_no_task_and_jobs_wait_for_a_worker_that_can_run_one(cloud: str) -> None:
    types = node_types(cloud)
    assert types[launcher(cloud)["head_node_type"]]["resources"]["CPU"] == 0
    config = load_config(str(INFRA / "distill.yaml")).ray
    worker = types["gpu-spot"]
    assert 1 <= worker["max_workers"] <= launcher(cloud)["max_workers"]
    assert worker["min_workers"] > 0 or config.wait_s > 0
    # Both machines, g5.4xlarge and g2-standard-16, have 16 CPUs and one GPU; Ray detects them on EC2.
    resources = {"CPU": 16, "GPU": 1, **worker["resources"]}
    assert config.cpus_per_task <= resources["CPU"]
    assert config.gpus_per_task <= resources["GPU"]


def test_the_parameters_of_the_nodes_match_the_model_of_ec2() -> None:
    model = botocore.session.Session().get_service_model("ec2").operation_model("RunInstances").input_shape
    assert model is not None
    for node in node_types("aws").values():
        parameters = {"MinCount": 1, "MaxCount": 1, **node["node_config"]}
        botocore.validate.validate_parameters(parameters, model)
        with pytest.raises(botocore.exceptions.ParamValidationError):
            botocore.validate.validate_parameters({**parameters, "InstanceMarketOption": {}}, model)
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] in ("required", "optional")
        assert re.fullmatch(r"arn:aws:iam::\d{12}:instance-profile/[\w-]+", parameters["IamInstanceProfile"]["Arn"])


def test_workers_are_spot_machines_and_heads_are_not() -> None:
    # Values of EC2's MarketType and of Compute Engine's ProvisioningModel.
    aws, gcp = node_types("aws"), node_types("gcp")
    assert aws["gpu-spot"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert gcp["gpu-spot"]["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
    assert "InstanceMarketOptions" not in aws["head"]["node_config"]
    assert "scheduling" not in gcp["head"]["node_config"]
