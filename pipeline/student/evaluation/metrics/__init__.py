"""Metrics of an evaluation, one file a task."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.student.evaluation.metrics.classification import classification_metrics
from pipeline.student.evaluation.metrics.domains import WORST_DOMAIN, metrics_by_domain
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


def metrics_of(data: DataConfig, best: str | None = None) -> MetricSet:
    """The metrics of images with this config.

    Args:
        best: the metric that selects the best checkpoint (``train.best``); None: as the task chooses.

    Raises:
        ConfigError: there is no such metric.
    """
    metrics = METRIC_SETS[data.task](data)
    metrics = metrics if data.domain is None else metrics_by_domain(metrics)
    return metrics if best is None else metrics.selecting(best)


__all__ = [
    "BACKBONE",
    "METRIC_SETS",
    "WORST_DOMAIN",
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
