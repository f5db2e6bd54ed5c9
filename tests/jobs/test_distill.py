"""One command for build and training: of one cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.distill import distill
from pipeline.errors import ConfigError
from schemas.config import Config


def test_several_caches_are_refused_before_one_is_built(tmp_path: Path) -> None:
    config = Config.model_validate(
        {
            "data": {"shards": "train.tar", "num_classes": 10, "cache": ["a", "b"]},
            "teacher": {"model": "timm/resnet18", "weights": "random"},
            "student": {"model": "timm/resnet18"},
            "cache": {"url": str(tmp_path / "cache")},
            "loss": [{"name": "kd"}],
            "run": {"url": str(tmp_path / "run")},
            "ray": {"address": "none"},
        }
    )
    with pytest.raises(ConfigError, match="distill builds one cache and trains from it") as caught:
        distill(config)
    assert caught.value.got == "2 caches"
    assert not list(tmp_path.iterdir())
