"""Metrics of an evaluation, one file a task."""

from __future__ import annotations

from pipeline.student.evaluation.metrics.classification import CLASSIFICATION
from pipeline.student.evaluation.metrics.metric_set import (
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

METRIC_SETS: dict[str, MetricSet] = {"classification": CLASSIFICATION}
"""By the name of the task."""


def metrics_of(task: str) -> MetricSet:
    """The metrics of the task with this name, which ``data.task`` is."""
    return METRIC_SETS[task]


__all__ = [
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
