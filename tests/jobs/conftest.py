"""A real Ray cluster shared by the tests of this folder, and configs over tiny shards of real digits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from jobs.build_cache import build_cache
from pipeline.shards.writer import pack_shards
from schemas.config import Config
from tests.jobs import NUM_CPUS
from tests.pipeline.caches import digit_samples

NETWORK = {
    "model": "python:pipeline.models.cifar:resnet",
    "kwargs": {"depth": 8, "widths": [4, 4, 6, 8]},
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}

Tree = Callable[..., dict[str, Any]]
Document = Callable[..., str]
JsonLog = Callable[[], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A cluster of two logical CPUs, which the jobs of this process use."""
    if ray.is_initialized():
        # Tests of other folders use this fixture too.
        yield
        return
    # Metrics reach Prometheus' page every second instead of every ten.
    quick = {"metrics_report_interval_ms": 1000}
    ray.init(address="local", num_cpus=NUM_CPUS, include_dashboard=False, log_to_driver=False, _system_config=quick)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four shards of 24 digits. Tests must not change them."""
    folder = tmp_path_factory.mktemp("shards")
    return pack_shards(digit_samples(96), f"{folder}/digits-%02d.tar", shard_size=24)


def tree_below(folder: Path, shards: list[str], **sections: Any) -> dict[str, Any]:
    """The plain tree of a config for a build and a training below ``folder``, merged with these sections."""
    base: dict[str, Any] = {
        "data": {
            "shards": list(shards),
            "val_shards": shards[-1],
            "num_classes": 10,
            # Else workers would use copies of equal caches of other tests or earlier sessions.
            "local_dir": str(folder / "node"),
        },
        "teacher": {**NETWORK, "weights": "random", "batch_size": 8},
        "views": {"kind": "crop", "count": 3, "size": 16, "mix_group": 16, "area": [0.5, 1.0], "flip": 0.0},
        "cache": {"url": str(folder / "cache"), "class_means": "eval", "views_per_part": 2},
        "student": dict(NETWORK),
        "loss": [{"name": "kd", "temperature": 2.0}],
        "train": {"epochs": 2, "global_batch_size": 24, "lr": 0.003},
        "run": {"url": str(folder / "run")},
        "ray": {"address": "none"},
    }
    for name, keys in sections.items():
        base[name] = {**base[name], **keys} if isinstance(keys, dict) and name in base else keys
    return base


@pytest.fixture
def tree(shards: list[str], tmp_path: Path) -> Tree:
    return partial(tree_below, tmp_path, shards)


@pytest.fixture(scope="session")
def cache_of_session(shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of ``tree()``, built once. Tests must not change it."""
    folder = tmp_path_factory.mktemp("built")
    build_cache(config_of(tree_below(folder, shards)))
    return folder / "cache"


@pytest.fixture
def built_cache(cache_of_session: Path, tmp_path: Path) -> Path:
    """The cache of ``tree()``: a copy that the test may change."""
    return shutil.copytree(cache_of_session, tmp_path / "cache")


@pytest.fixture
def document(tree: Tree, tmp_path: Path) -> Document:
    """The path of a YAML file with that tree."""

    def write(**sections: Any) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree(**sections)))
        return str(path)

    return write


@pytest.fixture
def json_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> JsonLog:
    """Makes the log JSON. Returns its objects since the last call."""
    monkeypatch.setenv("STILLROOM_LOG", "json")
    return lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def config_of(tree: dict[str, Any]) -> Config:
    return Config.model_validate(tree)


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file by its relative path, except those of a cache's ``log/``."""
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {str(name): path.read_bytes() for name, path in paths.items() if "log" not in name.parts}
