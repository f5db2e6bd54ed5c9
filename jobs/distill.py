"""Build what is missing of the cache, then train. ``python -m jobs.distill CONFIG [k.k=v …]``."""

from __future__ import annotations

import sys
from typing import Any

from jobs.build_cache import build_cache, describe
from jobs.entry import config_command
from jobs.ray_runtime import cluster
from jobs.train_student import describe as describe_training
from jobs.train_student import train_student
from pipeline.config import load_config, require
from pipeline.errors import ConfigError
from pipeline.student.preflight import check_distillation
from schemas.config import Config


def distill(config: Config) -> dict[str, Any]:
    """The union of a build's and a training's config; ``data.cache`` is ``cache.url``. Returns the run's summary.

    Raises:
        StillroomError: as the build and the training do; both configs are checked before either starts.
    """
    require(config, "cache.url", "data.shards", "teacher.model", "student.model", "run.url", "loss", command="distill")
    assert config.cache is not None
    if len(config.data.caches) > 1:
        raise ConfigError(
            "distill builds one cache and trains from it",
            where="data.cache",
            got=f"{len(config.data.caches)} caches",
            next_step="run: stillroom cache build CONFIG for each, then: stillroom train CONFIG",
        )
    training = config.model_copy(update={"data": config.data.model_copy(update={"cache": config.cache.url})})
    check_distillation(training)
    with cluster(config.ray):
        if config.teacher.mode == "cache":
            print(describe(build_cache(config)), file=sys.stderr)
        return train_student(training)


def main(source: str, overrides: list[str]) -> None:
    print(f"distill: {describe_training(distill(load_config(source, overrides)))}", file=sys.stderr)


if __name__ == "__main__":
    config_command("distill", main)
