"""Moments by Ray tasks have the bytes of a plain loop, and the command takes keys of the ray section."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from jobs.build_cache import build_cache
from jobs.cache_moments import cache_moments, main
from pipeline.cache.ops import moments
from pipeline.core.errors import CacheError, ConfigError
from schemas.config import RayConfig
from tests.errors import raises
from tests.jobs.conftest import JsonLog, Tree, config_of, files_below


@pytest.fixture
def cache(tree: Tree, tmp_path: Path) -> Path:
    """A cache with embeddings: 96 images with two views and an eval pass."""
    build_cache(config_of(tree(cache={"embeddings": "fp16"}, views={"count": 2})))
    return tmp_path / "cache"


@pytest.mark.usefixtures("ray_cluster")
def test_tasks_give_the_bytes_of_a_loop(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "SHARDS_PER_TASK", 1)
    copy = shutil.copytree(cache, tmp_path / "copy")
    before = files_below(copy)
    cache_moments(str(cache), RayConfig(address="none"))
    cache_moments(str(copy), RayConfig(address="auto"))
    assert files_below(copy) == files_below(cache)
    assert len(files_below(copy).keys() - before.keys()) == 2


def test_the_command_computes_them_once_and_says_of_what(cache: Path, json_log: JsonLog) -> None:
    for _ in range(2):
        main(str(cache), [])
    ends = [event for event in json_log() if event["event"] == "end"]
    assert [end["is_new"] for end in ends] == [True, False]
    assert [(end["num_rows"], end["num_mixed"], end["num_further"]) for end in ends] == 2 * [(192, 0, 96)]


def test_other_keys_are_refused(cache: Path) -> None:
    with raises("config.only-ray-keys", ConfigError, got="views.count=2"):
        main(str(cache), ["ray.cpus_per_task=1", "views.count=2"])


def test_a_folder_without_a_cache_is_bad_input(tmp_path: Path) -> None:
    with raises("cache.missing", CacheError):
        main(str(tmp_path), [])
