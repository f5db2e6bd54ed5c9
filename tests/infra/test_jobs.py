"""The jobs' commands, their config, and the pods that it needs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from jobs import build_cache, distill, train_student
from jobs.cli import app
from pipeline.cache.build.context import cache_config
from pipeline.models.summary import summarize_model
from pipeline.shards.writer import pack_shards
from pipeline.storage.config_files import load_config
from pipeline.student.training.config_checks import check_config
from pipeline.student.training.schedule import plan_training
from schemas.config import Config
from tests.infra.manifests import CLUSTERS, INFRA, ROOT, Document, cluster_spec, load, manifest, pods
from tests.pipeline.caches import digit_samples

# Each job, its module, and the equivalent command.
JOBS = {
    "rayjob-build": ("jobs.build_cache", ["cache", "build"]),
    "rayjob-train": ("jobs.train_student", ["train"]),
    "rayjob-distill": ("jobs.distill", ["distill"]),
}


def command(document: Document) -> tuple[str, list[str]]:
    """The module that the entry point runs, and its arguments."""
    python, option, module, *arguments = shlex.split(document["spec"]["entrypoint"])
    assert (python, option) == ("python", "-m")
    return module, arguments


def config_file(document: Document, path: str) -> Path:
    """The file of the ConfigMap that is mounted at ``path`` in the head's pod."""
    (kustomization,) = load(INFRA / "kustomization.yaml")
    files = {entry["name"]: entry["files"] for entry in kustomization["configMapGenerator"]}
    head = next(pods(document))
    (mount,) = [mount for mount in head.containers[0]["volumeMounts"] if Path(path).parent == Path(mount["mountPath"])]
    (volume,) = [volume for volume in head.spec["volumes"] if volume["name"] == mount["name"]]
    (name,) = [name for name in files[volume["configMap"]["name"]] if Path(name).name == Path(path).name]
    return INFRA / name


def config_of(name: str) -> Config:
    document = manifest(name)
    _, (path, *overrides) = command(document)
    return load_config(str(config_file(document, path)), overrides)


def test_all_resources_of_the_kustomization_exist() -> None:
    (kustomization,) = load(INFRA / "kustomization.yaml")
    files = [*kustomization["resources"], *kustomization["configMapGenerator"][0]["files"]]
    assert all((INFRA / name).is_file() for name in files)
    namespaces = {manifest(name)["metadata"]["namespace"] for name in (*CLUSTERS, "network-policy")}
    assert namespaces == {kustomization["namespace"]}


@pytest.mark.parametrize("name", JOBS)
def test_an_entry_point_runs_a_job_and_parses_as_the_equivalent_command(name: str) -> None:
    module, arguments = command(manifest(name))
    assert module == JOBS[name][0]
    assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()
    group: Any = typer.main.get_command(app)
    for part in JOBS[name][1]:
        group = group.commands[part]
    parsed = group.make_context(name, list(arguments)).params
    assert [parsed["config"], *(parsed["overrides"] or [])] == arguments


@pytest.mark.parametrize("name", JOBS)
def test_the_config_of_a_job_loads_and_has_the_keys_of_the_job(name: str) -> None:
    config = config_of(name)
    if name != "rayjob-train":
        assert cache_config(config).url == config.data.cache
    if name != "rayjob-build":
        assert check_config(config) == "s3://my-bucket/runs/r50-dist"
    # A job of KubeRay uses the cluster of its pods.
    assert config.ray.address == "auto"


def test_the_networks_and_the_schedule_match_the_comments_of_the_config() -> None:
    config = config_of("rayjob-distill")
    assert config.student is not None
    teacher, student = (
        summarize_model(model, widths={"logits": 1000}, size=224, where="here")
        for model in (config.teacher, config.student)
    )
    # From the tables of torchvision and timm.
    assert round(teacher.num_parameters / 1e6, 2) == 60.19
    assert round(student.num_parameters / 1e6, 2) == 25.56
    plan = plan_training(config.train, config.views, 1_281_167)
    # 1,281,167 images in batches of 1,024; five epochs of warm-up.
    assert plan.steps_per_epoch == 1251
    assert config.train.warmup_steps == 5 * 1251


@pytest.mark.parametrize("name", JOBS)
def test_tasks_and_workers_fit_on_a_pod_and_a_job_waits_for_enough_pods(name: str) -> None:
    config = config_of(name).ray
    (group,) = cluster_spec(manifest(name))["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    cpus, gpus = int(limits["cpu"]), int(limits["nvidia.com/gpu"])
    assert 1 <= config.cpus_per_task <= cpus
    assert 0 < config.gpus_per_task <= gpus
    assert config.cpus_per_worker <= cpus
    assert config.use_gpu
    assert config.max_retries > 0
    if name != "rayjob-build":
        # A training needs a place for every worker.
        assert min(cpus // config.cpus_per_worker, gpus) * group["maxReplicas"] >= config.num_workers
        assert config.max_failures > 0
    assert group["minReplicas"] > 0 or config.wait_s > 0


@pytest.mark.slow
def test_the_config_builds_trains_and_distils_with_small_images_and_networks(tmp_path: Path) -> None:
    shards = pack_shards(digit_samples(24), f"{tmp_path}/digits-%02d.tar", shard_size=12)
    network = "model: 'python:pipeline.models.cifar:resnet', weights: random, mean: [0, 0, 0], std: [1, 1, 1]"
    overrides = [
        f"data={{shards: {shards}, val_shards: {shards}, num_classes: 10, local_dir: {tmp_path}/node}}",
        f"teacher={{{network}, kwargs: {{depth: 8}}, batch_size: 8, precision: fp32}}",
        f"student={{{network}, kwargs: {{depth: 8, widths: [4, 4, 4, 4]}}}}",
        "views={count: 2, size: 8}",
        f"cache.url={tmp_path}/cache",
        f"run.url={tmp_path}/run",
        "train={epochs: 1, warmup_steps: 1, global_batch_size: 12, num_workers: 0, precision: fp32}",
        "ray={address: none, gpus_per_task: 0, use_gpu: false, num_workers: 1}",
    ]
    source = str(INFRA / "distill.yaml")
    build_cache.main(source, overrides)
    assert (tmp_path / "cache" / "manifest.json").is_file()
    train_student.main(source, overrides)
    assert (tmp_path / "run" / "summary.json").is_file()
    distill.main(source, [*overrides, f"run.url={tmp_path}/again"])
    assert (tmp_path / "again" / "summary.json").is_file()
