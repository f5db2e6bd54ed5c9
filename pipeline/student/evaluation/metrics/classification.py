"""Metrics of image classification: those of one head without name."""

from __future__ import annotations

from dataclasses import replace

from pipeline.student.evaluation.metrics.head import Head
from pipeline.student.evaluation.metrics.heads import head_metrics
from pipeline.student.evaluation.metrics.metric_set import MetricSet
from pipeline.tasks.classification import LABEL, LOGITS
from schemas.config import DataConfig


def classification_metrics(data: DataConfig) -> MetricSet:
    head = Head(None, LOGITS, LABEL, data.num_classes)
    # ``results.json`` of earlier versions has no other metrics.
    return replace(head_metrics([(head, "class")]), table=("top1", "agreement"))
