"""The metrics of embeddings without a classifier: their cosine to the teacher's, and how well their neighbours and a
linear probe predict labels."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pipeline.student.distributed import DistributedContext
from pipeline.student.evaluation.metrics.head import COSINE, CombinedSums, CosineSums
from pipeline.student.evaluation.metrics.metric_set import (
    BACKBONE,
    EvaluationScope,
    Metric,
    MetricSet,
    MetricSums,
    Outputs,
    RowMeans,
)
from pipeline.tasks import EMBEDDING, Targets
from pipeline.tasks.classification import LABEL, NO_LABEL
from schemas.config import DataConfig

KNN = Metric(
    key="knn_top1",
    title="k-NN top-1",
    needs=("targets", "reference"),
    gauge="Accuracy of nearest neighbours in that evaluation, 0 to 1.",
)
PROBE = Metric(
    key="probe_top1",
    title="linear probe top-1",
    needs=("targets", "reference", "probe"),
    gauge="Accuracy of the linear probe in the last evaluation of the run, 0 to 1.",
)


def embedding_metrics(_: DataConfig) -> MetricSet:
    """The cosine to the teacher selects the best checkpoint; where it is not measured, the accuracy of neighbours."""
    cosine = replace(COSINE, gauge="Mean cosine of the embeddings of student and teacher in the last evaluation.")
    return MetricSet(
        metrics=(cosine, KNN, PROBE),
        selection=(COSINE.key, KNN.key),
        table=(KNN.key, PROBE.key, COSINE.key),
        worst_domain=(KNN.key, PROBE.key),
        sums=lambda _, scope, __: CombinedSums([CosineSums(scope), ReferenceSums(scope)]),
    )


class ReferenceSums(MetricSums):
    """Top-1 hits of the classifiers of ``EvaluationScope.reference`` on the student's own embeddings."""

    def __init__(self, scope: EvaluationScope) -> None:
        self._reference = scope.reference
        self._means = RowMeans((KNN.key, PROBE.key))

    def add(self, student: Outputs, teacher: Outputs | None, targets: Targets) -> None:  # noqa: ARG002
        reference = self._reference
        if reference is None:
            return
        embedding_ND, label_N = student.get(BACKBONE, student[EMBEDDING]), torch.from_numpy(targets[LABEL]).long()
        self._means.add_each(KNN.key, _hits(reference.knn(embedding_ND), label_N))
        if reference.fits_probe:
            self._means.add_each(PROBE.key, _hits(reference.probe(embedding_ND), label_N))

    def finish(self, distributed: DistributedContext) -> dict[str, float | None]:
        return self._means.over_ranks(distributed)

    def by_row(self) -> dict[str, Tensor]:
        return self._means.by_row()


def _hits(predicted_N: Tensor, label_N: Tensor) -> Tensor:
    return (predicted_N == label_N).double().masked_fill(label_N == NO_LABEL, float("nan"))
