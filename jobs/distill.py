"""Build what is missing of a cache, then train. ``python -m jobs.distill CONFIG [k.k=v …]``."""

from __future__ import annotations

from typing import Any

from jobs.build_cache import build_cache, describe
from jobs.cache_moments import compute
from jobs.entry import config_command
from jobs.observability.log import emit
from jobs.ray.cluster import cluster
from jobs.train_student import describe as describe_training
from jobs.train_student import train_student
from pipeline.storage.config_files import load_config
from pipeline.student.training.config_checks import check_distillation, training_of
from schemas.config import Config


def distill(config: Config) -> dict[str, Any]:
    """Builds and trains from one config, in which ``cache.url`` is also ``data.cache``. Returns the run's summary.

    Raises:
        StillroomError: as the build and the training do. Both are checked before either starts.
    """
    training = training_of(config)
    check_distillation(training)
    with cluster(config.ray):
        if config.teacher.mode == "cache":
            emit(describe(build_cache(config), config.data), event="end")
            if config.teacher.standardizes:
                assert config.cache is not None, "ensured by check_distillation"
                compute(config.cache.url, config.ray)
        return train_student(training)


def main(source: str, overrides: list[str]) -> None:
    config = load_config(source, overrides)
    emit(f"distill: {describe_training(distill(config), config)}", event="end")


if __name__ == "__main__":
    config_command("distill", main)
