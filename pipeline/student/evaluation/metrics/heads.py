"""The metrics of a task with heads: those of each head, and the cosine of the embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.student.evaluation.metrics.class_head import ClassHeadSums, class_head_metrics
from pipeline.student.evaluation.metrics.head import COSINE, CombinedSums, CosineSums, Head
from pipeline.student.evaluation.metrics.metric_set import EvaluationScope, MetricSet, MetricSums
from pipeline.student.evaluation.metrics.multilabel_head import MultilabelHeadSums, multilabel_head_metrics
from pipeline.tasks import HeadKind, task_of
from schemas.config import DataConfig

_METRICS = {"class": class_head_metrics, "multilabel": multilabel_head_metrics}
_MAIN = {"class": "top1", "multilabel": "map"}
_WORST_DOMAIN = {"class": ("top1", "balanced_accuracy"), "multilabel": ("map",)}
_TABLE = {"class": ("top1", "balanced_accuracy", "agreement"), "multilabel": ("map", "agreement")}


def heads_of(data: DataConfig) -> list[tuple[Head, HeadKind]]:
    """The heads of the task, in its order."""
    heads = task_of(data).heads
    return [(Head(head.name, head.output, head.column, head.num_classes), head.kind) for head in heads]


def head_metrics(heads: Sequence[tuple[Head, HeadKind]]) -> MetricSet:
    """The metrics of these heads. The best checkpoint follows the top-1, or mAP, of the first head that is trained and
    has labels; without labels the agreement of the first head."""

    def build(_: DataConfig, scope: EvaluationScope, device: torch.device) -> MetricSums:
        sums = [
            ClassHeadSums(head, scope, device) if kind == "class" else MultilabelHeadSums(head, scope)
            for head, kind in heads
        ]
        return CombinedSums([*sums, CosineSums(scope)])

    main = [head.key(_MAIN[kind]) for head, kind in heads]
    agreements = [head.key("agreement") for head, _ in heads]
    return MetricSet(
        metrics=(*(metric for head, kind in heads for metric in _METRICS[kind](head)), COSINE),
        selection=(*main, *agreements, COSINE.key),
        table=tuple(head.key(name) for head, kind in heads for name in _TABLE[kind]),
        worst_domain=tuple(head.key(name) for head, kind in heads for name in _WORST_DOMAIN[kind]),
        sums=build,
    )
