"""Real shards, a real tiny teacher and finished caches, small enough to build in every test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.shards.writer import pack_shards
from schemas.config import Config
from tests.pipeline.caches import TinyCache, build, copy_of, digit_samples

NUM_DIGITS, DIGITS_PER_SHARD = 35, 20

TinyConfig = Callable[..., Config]


@pytest.fixture(scope="session")
def digits_shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two shards of 20 and 15 digits with labels: paths of files not to be changed (copy them to change them)."""
    folder = tmp_path_factory.mktemp("digits")
    return pack_shards(digit_samples(NUM_DIGITS), f"{folder}/digits-%02d.tar", shard_size=DIGITS_PER_SHARD)


def build_tiny(shards: list[str], cache_url: str, overrides: dict[str, Any]) -> TinyCache:
    """The cache of ``tiny_config_of``."""
    config = tiny_config_of(shards, cache_url, overrides)
    build(config)
    return TinyCache(cache_url, config)


def tiny_config_of(shards: list[str], cache_url: str, overrides: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {
        "data": {"shards": shards, "num_classes": 10},
        "teacher": {
            "model": "python:pipeline.models.cifar:resnet",
            "weights": "random",
            "kwargs": {"depth": 8, "widths": [4, 4, 6, 7]},
            "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.3, 0.25],
            "batch_size": 8,
        },
        "views": {"kind": "function_matching", "count": 3, "size": 16, "mix_group": 8, "area": [0.3, 1.0]},
        "cache": {
            "url": cache_url,
            "logits": "fp32",
            "embeddings": "fp32",
            "class_means": "eval",
            "views_per_part": 2,
        },
        "ray": {"address": "none"},
    }
    for section, keys in overrides.items():
        tree[section] = {**tree[section], **keys} if section in tree and isinstance(keys, dict) else keys
    return Config.model_validate(tree)


@pytest.fixture
def tiny_config(digits_shards: list[str], tmp_path: Path) -> TinyConfig:
    """``tiny_config(views={"count": 1}, …)``: a config over the digits, sections merged key by key over the defaults.

    Its cache URL is a folder for this test alone, which does not exist yet.
    """
    return lambda **overrides: tiny_config_of(digits_shards, str(tmp_path / "cache"), overrides)


@pytest.fixture(scope="session")
def built_cache(digits_shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> TinyCache:
    """The cache of the default config, built once. To be read, never written."""
    return build_tiny(digits_shards, str(tmp_path_factory.mktemp("built") / "cache"), {})


@pytest.fixture
def tiny_cache(built_cache: TinyCache, tmp_path: Path) -> TinyCache:
    """A copy of ``built_cache`` that the test may change."""
    return copy_of(built_cache, tmp_path / "cache")
