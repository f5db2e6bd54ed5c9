"""Metrics of image classification: those of one head without name, and of its embedding with a reference."""

from __future__ import annotations

from dataclasses import replace

import torch

from pipeline.student.evaluation.metrics.embedding import KNN, PROBE, ReferenceSums
from pipeline.student.evaluation.metrics.head import CombinedSums, Head
from pipeline.student.evaluation.metrics.heads import head_metrics
from pipeline.student.evaluation.metrics.metric_set import EvaluationScope, MetricSet, MetricSums
from pipeline.tasks.classification import LABEL, LOGITS
from schemas.config import DataConfig


def classification_metrics(data: DataConfig) -> MetricSet:
    head = Head(None, LOGITS, LABEL, data.num_classes)
    of_head = head_metrics([(head, "class")])

    def build(data: DataConfig, scope: EvaluationScope, device: torch.device) -> MetricSums:
        return CombinedSums([of_head.sums(data, scope, device), ReferenceSums(scope)])

    # Ray has gauges for what every run measures.
    with_reference = (replace(metric, gauge=None) for metric in (KNN, PROBE))
    # ``results.json`` of earlier versions has no other metrics.
    table = ("top1", "agreement")
    return replace(of_head, metrics=(*of_head.metrics, *with_reference), table=table, sums=build)
