"""``ray job submit`` on a local cluster: the distill job from upload to results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.jobs.clusters import HeadNode, head_node
from tests.jobs.conftest import Tree

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory):
    with head_node(tmp_path_factory.mktemp("cluster"), num_cpus=4) as node:
        yield node


def submit(cluster: HeadNode, *entrypoint: str) -> subprocess.CompletedProcess[str]:
    """What a user types: uploads the checkout, follows the job's log, exits as the job does."""
    ray = Path(sys.executable).parent / "ray"
    command = [ray, "job", "submit", "--address", cluster.dashboard_url, "--working-dir", ".", "--", *entrypoint]
    return subprocess.run(command, cwd=ROOT, env=cluster.env, capture_output=True, text=True, timeout=400, check=False)


def write(tree: dict[str, object], path: Path) -> str:
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def test_a_submitted_distill_job_streams_its_log_and_leaves_cache_and_student(
    cluster: HeadNode, tree: Tree, tmp_path: Path
) -> None:
    config = write(tree(ray={"address": "auto", "num_workers": 2}), tmp_path / "distill.yaml")
    done = submit(cluster, "python", "-m", "jobs.distill", config, "train.epochs=3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cache: 96 images x 3 views in 4 shards" in done.stdout
    assert "12 steps" in done.stdout
    assert "succeeded" in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["epochs"]) == (12, 3)
    assert (tmp_path / "cache" / "manifest.json").exists()


@pytest.mark.parametrize("module", ["build_cache", "train_student"])
def test_a_submitted_job_with_a_mistake_shows_its_one_message(
    module: str, cluster: HeadNode, tree: Tree, tmp_path: Path
) -> None:
    config = write(tree(ray={"address": "auto"}, views={"kind": "crops"}), tmp_path / "bad.yaml")
    done = submit(cluster, "python", "-m", f"jobs.{module}", config)
    assert done.returncode == 1
    assert "views.kind" in done.stdout
    assert "exit code 2" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout


def test_the_build_and_train_jobs_run_one_after_the_other(cluster: HeadNode, tree: Tree, tmp_path: Path) -> None:
    config = write(tree(ray={"address": "auto"}, data={"cache": str(tmp_path / "cache")}), tmp_path / "both.yaml")
    for module in ("build_cache", "train_student"):
        done = submit(cluster, "python", "-m", f"jobs.{module}", config)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "summary.json").exists()
    assert os.path.getsize(tmp_path / "run" / "checkpoints" / "last.pt") > 0  # noqa: PTH202
