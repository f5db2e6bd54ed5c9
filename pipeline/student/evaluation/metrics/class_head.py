"""Metrics of a head that predicts one class: accuracy and calibration on labels, agreement with a teacher."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from pipeline.student.distributed import DistributedContext
from pipeline.student.evaluation.metrics.head import Head
from pipeline.student.evaluation.metrics.metric_set import EvaluationScope, Metric, MetricSums, Outputs, RowMeans
from pipeline.tasks import Targets
from pipeline.tasks.classification import NO_LABEL, class_ranks, predicted_classes

_ECE_BINS = 15
_MIN_CLASSES_OF_TOP5 = 6


def class_head_metrics(head: Head) -> tuple[Metric, ...]:
    """In the order of JSON and tables."""
    top5 = head.metric("top5", "top-5", "targets", "student", gauge="Top-5 accuracy of that evaluation, 0 to 1.")
    return (
        # Shares of the labelled rows, by the rank of ``class_ranks``.
        head.metric(
            "top1",
            "top-1",
            "targets",
            "student",
            teacher_key="teacher_top1",
            gauge="Accuracy of the last evaluation, 0 to 1.",
        ),
        *([top5] if _has_top5(head) else []),
        # Mean of the recalls of the classes that occur.
        head.metric(
            "balanced_accuracy",
            "balanced accuracy",
            "targets",
            "student",
            gauge="Balanced accuracy of that evaluation, 0 to 1.",
        ),
        # Guo 2017: mean over the labelled rows of |accuracy - confidence| in 15 bins.
        head.metric("ece", "calibration error", "targets", "student", higher_is_better=False),
        # Share of the rows for which student and teacher predict the same class.
        head.metric(
            "agreement",
            "agreement with the teacher",
            "teacher",
            "student",
            gauge="Agreement of student and teacher in that evaluation, 0 to 1.",
        ),
        # Mean over the rows of KL(teacher ‖ student) at T = 1.
        head.metric("kl", "KL from the teacher", "teacher", "student", unit="nats", higher_is_better=False),
        head.metric("teacher_top1", "teacher top-1", "targets", "teacher"),
    )


def _has_top5(head: Head) -> bool:
    """Of named heads, those in which it is not always 1."""
    return head.num_classes is None or head.name is None or head.num_classes >= _MIN_CLASSES_OF_TOP5


class ClassHeadSums(MetricSums):
    """Sums of ``class_head_metrics``."""

    def __init__(self, head: Head, scope: EvaluationScope, device: torch.device) -> None:
        # The import takes seconds, which only a process that evaluates should pay.
        from torchmetrics.classification import MulticlassCalibrationError

        assert head.num_classes is not None
        self._head, self._is_measured = head, head.is_measured(scope)
        top5 = ["top5"] if _has_top5(head) else []
        self._means = RowMeans(map(head.key, ("top1", *top5, "agreement", "kl", "teacher_top1")))
        self._calibration = MulticlassCalibrationError(head.num_classes, n_bins=_ECE_BINS, norm="l1").to(device)
        self._num_rows_K, self._num_hits_K = torch.zeros(2, head.num_classes, dtype=torch.int64)
        self._labels: list[Tensor] = []

    def add(self, student: Outputs, teacher: Outputs | None, targets: Targets) -> None:
        label_N = torch.from_numpy(targets[self._head.target]).long()
        if self._is_measured:
            self._add_accuracy(student[self._head.output], label_N)
        if teacher is not None and self._head.output in teacher:
            self._add_comparison(student, teacher, label_N)

    def _add_accuracy(self, logits_NK: Tensor, label_N: Tensor) -> None:
        is_labelled_N = label_N != NO_LABEL
        logits_MK, label_M = logits_NK[is_labelled_N], label_N[is_labelled_N]
        rank_M = class_ranks(logits_MK.numpy(), label_M.numpy())
        is_hit_M = torch.from_numpy(rank_M < 1)
        hit_N = torch.full((len(label_N),), torch.nan, dtype=torch.float64)
        hit_N[is_labelled_N] = is_hit_M.double()
        self._means.add_each(self._head.key("top1"), hit_N)
        if _has_top5(self._head):
            self._means.add(self._head.key("top5"), int((rank_M < 5).sum()), len(rank_M))
        self._labels.append(label_N)
        num_classes = len(self._num_rows_K)
        self._num_rows_K += label_M.bincount(minlength=num_classes)
        self._num_hits_K += label_M[is_hit_M].bincount(minlength=num_classes)
        self._add_confidences(logits_MK, label_M)

    def _add_confidences(self, logits_MK: Tensor, label_M: Tensor) -> None:
        device = self._calibration.device
        # torchmetrics would take logits that lie in [0, 1] for probabilities.
        self._calibration.update(logits_MK.softmax(1).to(device), label_M.to(device))

    def _add_comparison(self, student: Outputs, teacher: Outputs, label_N: Tensor) -> None:
        head = self._head
        class_N = torch.from_numpy(predicted_classes(teacher[head.output].numpy()))
        hits = int((class_N == label_N).sum())
        self._means.add(head.key("teacher_top1"), hits, int((label_N != NO_LABEL).sum()))
        if self._is_measured:
            agrees_N = torch.from_numpy(predicted_classes(student[head.output].numpy())) == class_N
            self._means.add_each(head.key("agreement"), agrees_N.double())
            log_p, log_q = (outputs[head.output].double().log_softmax(1) for outputs in (teacher, student))
            self._means.add(head.key("kl"), float(kl_div(log_q, log_p, reduction="sum", log_target=True)), len(label_N))

    def finish(self, distributed: DistributedContext) -> dict[str, float | None]:
        means = self._means.over_ranks(distributed)
        counts_2K = torch.stack([self._num_rows_K, self._num_hits_K]).to(distributed.device)
        self._num_rows_K, self._num_hits_K = distributed.sum(counts_2K).cpu()
        recalls = [recall for recall in self._recalls() if recall is not None]
        balanced = sum(recalls) / len(recalls) if recalls else None
        # torchmetrics gathers the confidences of all ranks, and warns of a rank that added none.
        self._add_confidences(torch.empty(0, len(self._num_rows_K)), torch.empty(0, dtype=torch.int64))
        ece = float(self._calibration.compute()) if recalls else None
        return {**means, self._head.key("balanced_accuracy"): balanced, self._head.key("ece"): ece}

    def by_row(self) -> dict[str, Tensor]:
        """Balanced accuracy is the mean over labelled rows of a hit, weighted by N / (C · rows of its class), where C
        is the number of classes that occur."""
        rows, top1 = self._means.by_row(), self._head.key("top1")
        if top1 not in rows:
            return rows
        label_N = torch.cat(self._labels)
        weight_K = self._num_rows_K.sum() / (self._num_rows_K.count_nonzero() * self._num_rows_K.double())
        # A row without label has NaN for its hit; its weight does not matter.
        return {**rows, self._head.key("balanced_accuracy"): rows[top1] * weight_K[label_N]}

    def per_class(self) -> dict[str, list[float | None]]:
        return {self._head.key("recall"): self._recalls()} if self._is_measured else {}

    def _recalls(self) -> list[float | None]:
        """[K]; None for a class that does not occur."""
        counts = zip(self._num_hits_K.tolist(), self._num_rows_K.tolist(), strict=True)
        return [hits / num_rows if num_rows else None for hits, num_rows in counts]
