"""Embeddings of teachers without a classifier: no head and no classes. Labels, where data have them, are for evaluation
alone, and are read as in classification."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.tasks.classification import Classification, HitCounter
from pipeline.tasks.task import EMBEDDING, LABEL, OutputSpec, Targets, TaskHead, TeacherOutputs
from schemas.cache_format import Statistics
from schemas.config import CacheConfig


class LabelCounter(HitCounter):
    """Counts labelled rows and labels by class; without logits there are no hits."""

    def add(self, outputs: TeacherOutputs, targets: Targets) -> None:  # noqa: ARG002
        self.add_labels(targets[LABEL])


@dataclass(frozen=True, slots=True)
class Embedding(Classification):
    """``max_classes``: if the config has it, a label must be smaller; no network depends on it."""

    name = "embedding"
    required_keys = ()
    trains_on_targets = False

    @property
    def statistics_outputs(self) -> tuple[str, ...]:
        return ()

    @property
    def heads(self) -> tuple[TaskHead, ...]:
        return ()

    @property
    def widths(self) -> dict[str, int]:
        return {}

    def class_ids(self, targets: Targets) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """None: networks of this task have no classes."""
        del targets
        return np.empty(0, np.int64), np.empty(0, np.int32)

    def outputs(self, cache: CacheConfig, widths: Mapping[str, int]) -> tuple[OutputSpec, ...]:
        return (OutputSpec(EMBEDDING, (widths[EMBEDDING],), cache.embeddings),) if EMBEDDING in widths else ()

    @property
    def roles(self) -> dict[str, str]:
        return {EMBEDDING: "embedding"}

    def accumulate(self) -> LabelCounter:
        return LabelCounter()

    def teacher_metrics(self, statistics: Statistics) -> dict[str, float | None]:
        """None are known: an embedding has no classes to be right about."""
        del statistics
        return {}
