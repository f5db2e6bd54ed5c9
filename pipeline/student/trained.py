"""A run's checkpoint as the network that was trained, in eval mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline import storage
from pipeline.config import require
from pipeline.errors import ConfigError, ModelError
from pipeline.models import LoadedModel, load_model
from pipeline.student import checkpoint
from pipeline.student.facts import LessonFacts, lesson_facts
from pipeline.student.finite import FiniteWeights
from schemas.config import Config

CheckpointName = Literal["best", "last"]
_NUM_NAMED = 3


@dataclass(frozen=True, slots=True)
class Trained:
    """``step`` counts the optimiser steps behind the weights; projectors, which only training has, are not loaded."""

    config: Config
    lessons: LessonFacts
    student: LoadedModel
    step: int


def load_trained(run_url: str, checkpoint_name: CheckpointName) -> Trained:
    """
    Raises:
        ConfigError: there is no run, or it has no such checkpoint.
        CacheError: the run's cache cannot be read, or the checkpoint is damaged.
        ModelError: the checkpoint's weights are not finite.
    """
    config = checkpoint.read_config(run_url)
    require(config, "student.model", "run.url", command=f"the config of {storage.redact(run_url)}")
    lessons = lesson_facts(config)
    assert config.student is not None
    student = load_model(
        config.student.model_copy(update={"weights": "random", "sha256": None}),
        num_classes=lessons.num_classes,
        size=config.student.size or lessons.size,
        where="student",
    )
    name = checkpoint.BEST if checkpoint_name == "best" else checkpoint.LAST
    state = checkpoint.load(run_url, name)
    if state is None:
        raise ConfigError(
            f"this run has no {checkpoint_name} checkpoint",
            where=storage.redact(run_url),
            next_step="train it to the end of an epoch"
            + (", with data.val_shards that have labels, or with a teacher online" if name == checkpoint.BEST else ""),
        )
    weights = FiniteWeights.of([student.module.network])
    student.module.network.load_state_dict(state["model"])
    _check_finite(weights, storage.join(run_url, name), int(state["step"]))
    return Trained(config, lessons, student, int(state["step"]))


def _check_finite(weights: FiniteWeights, url: str, step: int) -> None:
    broken = weights.broken()
    if broken:
        raise ModelError(
            "the weights of this checkpoint are not finite",
            code="weights.not-finite",
            where=storage.redact(url),
            got=f"NaN or infinity in {', '.join(broken[:_NUM_NAMED])}, after {step} steps",
            next_step="train again with a lower train.lr or with train.clip_norm, in another run.url",
        )
