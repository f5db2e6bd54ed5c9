"""The metrics of embeddings without a classifier: their cosine to the teacher's."""

from __future__ import annotations

import torch

from pipeline.student.evaluation.metrics.head import COSINE, CosineSums
from pipeline.student.evaluation.metrics.metric_set import EvaluationScope, MetricSet, MetricSums
from schemas.config import DataConfig


def embedding_metrics(_: DataConfig) -> MetricSet:
    return MetricSet(metrics=(COSINE,), selection=(COSINE.key,), table=(COSINE.key,), sums=_sums)


def _sums(_: DataConfig, scope: EvaluationScope, __: torch.device) -> MetricSums:
    return CosineSums(scope)
