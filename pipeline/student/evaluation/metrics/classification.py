"""Metrics of image classification: accuracy and calibration on labels, agreement with a teacher."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div

from pipeline.student.distributed import DistributedContext
from pipeline.student.evaluation.metrics.metric_set import (
    EvaluationScope,
    Metric,
    MetricSet,
    MetricSums,
    Outputs,
    RowMeans,
)
from pipeline.tasks import Targets
from pipeline.tasks.classification import EMBEDDING, LABEL, LOGITS, NO_LABEL, class_ranks, predicted_classes
from schemas.config import DataConfig

_ECE_BINS = 15


class ClassificationSums(MetricSums):
    def __init__(self, data: DataConfig, scope: EvaluationScope, device: torch.device) -> None:
        # The import takes seconds, which only a process that evaluates should pay.
        from torchmetrics.classification import MulticlassCalibrationError

        assert data.num_classes is not None
        self._scope = scope
        self._means = RowMeans(("top1", "top5", "agreement", "kl", "teacher_top1", "cosine"))
        self._calibration = MulticlassCalibrationError(data.num_classes, n_bins=_ECE_BINS, norm="l1").to(device)

    def add(self, student: Outputs, teacher: Outputs | None, targets: Targets) -> None:
        label_N = torch.from_numpy(targets[LABEL])
        if self._scope.head_trained:
            self._add_accuracy(student[LOGITS], label_N)
        if teacher is not None:
            self._add_comparison(student, teacher, label_N)

    def _add_accuracy(self, logits_NK: Tensor, label_N: Tensor) -> None:
        is_labelled_N = label_N != NO_LABEL
        logits_MK, label_M = logits_NK[is_labelled_N], label_N[is_labelled_N].long()
        rank_M = class_ranks(logits_MK.numpy(), label_M.numpy())
        hit_N = torch.full((len(label_N),), torch.nan, dtype=torch.float64)
        hit_N[is_labelled_N] = torch.from_numpy(rank_M < 1).double()
        self._means.add_each("top1", hit_N)
        self._means.add("top5", int((rank_M < 5).sum()), len(rank_M))
        if len(label_M):
            # torchmetrics would take logits that lie in [0, 1] for probabilities.
            device = self._calibration.device
            self._calibration.update(logits_MK.softmax(1).to(device), label_M.to(device))

    def _add_comparison(self, student: Outputs, teacher: Outputs, label_N: Tensor) -> None:
        num_rows, class_N = len(label_N), predicted_classes(teacher[LOGITS].numpy())
        hits = int((class_N == label_N.numpy()).sum())
        self._means.add("teacher_top1", hits, int((label_N != NO_LABEL).sum()))
        if self._scope.head_trained:
            agrees_N = predicted_classes(student[LOGITS].numpy()) == class_N
            self._means.add_each("agreement", torch.from_numpy(agrees_N).double())
            log_p, log_q = (outputs[LOGITS].double().log_softmax(1) for outputs in (teacher, student))
            self._means.add("kl", float(kl_div(log_q, log_p, reduction="sum", log_target=True)), num_rows)
        if self._scope.projector is not None:
            cosine_N = cosine_similarity(student[EMBEDDING].double(), teacher[EMBEDDING].double())
            self._means.add("cosine", float(cosine_N.sum()), num_rows)

    def by_row(self) -> dict[str, Tensor]:
        return self._means.by_row()

    def finish(self, distributed: DistributedContext) -> dict[str, float | None]:
        means = self._means.over_ranks(distributed)
        # torchmetrics gathers the confidences of all ranks, also of ranks without any.
        ece = None if means["top1"] is None else float(self._calibration.compute())
        return {**means, "ece": ece}


CLASSIFICATION = MetricSet(
    metrics=(
        # Shares of the labelled rows, by the rank of ``class_ranks``.
        Metric(
            key="top1",
            title="top-1",
            needs=("targets", "head"),
            teacher_key="teacher_top1",
            gauge="Accuracy of the last evaluation, 0 to 1.",
        ),
        Metric(
            key="top5", title="top-5", needs=("targets", "head"), gauge="Top-5 accuracy of that evaluation, 0 to 1."
        ),
        # Guo 2017: mean over the labelled rows of |accuracy - confidence| in 15 bins.
        Metric(key="ece", title="calibration error", higher_is_better=False, needs=("targets", "head")),
        # Share of the rows for which student and teacher predict the same class.
        Metric(
            key="agreement",
            title="agreement with the teacher",
            needs=("teacher", "head"),
            teacher_outputs=(LOGITS,),
            gauge="Agreement of student and teacher in that evaluation, 0 to 1.",
        ),
        # Mean over the rows of KL(teacher ‖ student) at T = 1.
        Metric(
            key="kl",
            title="KL from the teacher",
            unit="nats",
            higher_is_better=False,
            needs=("teacher", "head"),
            teacher_outputs=(LOGITS,),
        ),
        Metric(key="teacher_top1", title="teacher top-1", needs=("targets", "teacher"), teacher_outputs=(LOGITS,)),
        # Mean over the rows of the cosine between the embeddings of student and teacher, through the projector of the
        # first loss that has one; for students that learn from embeddings.
        Metric(
            key="cosine",
            title="cosine to the teacher",
            unit="none",
            needs=("teacher", "projector"),
            teacher_outputs=(EMBEDDING,),
        ),
    ),
    selection=("top1", "agreement", "cosine"),
    table=("top1", "agreement"),
    sums=ClassificationSums,
)
