"""Metrics of an evaluation, one file a task."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.student.evaluation.metrics.classification import classification_metrics
from pipeline.student.evaluation.metrics.embedding import embedding_metrics
from pipeline.student.evaluation.metrics.heads import head_metrics, heads_of
from pipeline.student.evaluation.metrics.metric_set import (
    BACKBONE,
    Evaluation,
    EvaluationScope,
    Metric,
    MetricSet,
    MetricSums,
    Outputs,
    RowMeans,
    Score,
    Values,
)
from pipeline.tasks.classification import Classification
from schemas.config import DataConfig

METRIC_SETS: dict[str, Callable[[DataConfig], MetricSet]] = {
    Classification.name: classification_metrics,
    "heads": lambda data: head_metrics(heads_of(data)),
    "embedding": embedding_metrics,
}
"""By the name of the task; a set may depend on the config, such as on the names of heads."""


def metrics_of(data: DataConfig) -> MetricSet:
    """The metrics of images with this config."""
    return METRIC_SETS[data.task](data)


__all__ = [
    "BACKBONE",
    "METRIC_SETS",
    "Evaluation",
    "EvaluationScope",
    "Metric",
    "MetricSet",
    "MetricSums",
    "Outputs",
    "RowMeans",
    "Score",
    "Values",
    "metrics_of",
]
