"""Metrics of a head that predicts any number of classes: average precision and F1, agreement with a teacher."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid

from pipeline.student.distributed import DistributedContext
from pipeline.student.evaluation.metrics.head import Head
from pipeline.student.evaluation.metrics.metric_set import EvaluationScope, Metric, MetricSums, Outputs, RowMeans
from pipeline.tasks import Targets


def multilabel_head_metrics(head: Head) -> tuple[Metric, ...]:
    """In the order of JSON and tables. A class is predicted if its sigmoid is above 0.5, that is its logit above 0."""
    return (
        # Mean over the classes with a labelled image of the area below the steps of precision over recall.
        head.metric(
            "map",
            "mAP",
            "targets",
            "student",
            teacher_key="teacher_map",
            gauge="Mean average precision of the last evaluation, 0 to 1.",
        ),
        # F1 of the decisions for all classes together, and its mean over the classes that occur.
        head.metric("f1_micro", "micro F1", "targets", "student", gauge="Micro F1 of that evaluation, 0 to 1."),
        head.metric("f1_macro", "macro F1", "targets", "student"),
        # Share of the decisions, over rows and classes, in which student and teacher agree.
        head.metric(
            "agreement",
            "agreement with the teacher",
            "teacher",
            "student",
            gauge="Agreement of student and teacher in that evaluation, 0 to 1.",
        ),
        # Mean over rows and classes of the binary KL(teacher ‖ student) at T = 1.
        head.metric("kl", "KL from the teacher", "teacher", "student", unit="nats", higher_is_better=False),
        head.metric("teacher_map", "teacher mAP", "targets", "teacher"),
    )


class MultilabelHeadSums(MetricSums):
    """Sums of ``multilabel_head_metrics``. Average precision has no sums: all logits of labelled rows are stored, in
    fp32, and every rank gets those of all ranks.

    A target is int8 [N,K]: 1 for the classes of a row, and -1 in all of a row without labels.
    """

    def __init__(self, head: Head, scope: EvaluationScope) -> None:
        assert head.num_classes is not None
        self._head, self._is_measured = head, head.is_measured(scope)
        self._means = RowMeans(map(head.key, ("agreement", "kl")))
        self._target, self._student, self._teacher = (_Rows(head.num_classes) for _ in range(3))
        self._per_class: dict[str, NDArray[np.float64]] = {}

    def add(self, student: Outputs, teacher: Outputs | None, targets: Targets) -> None:
        target_NK = torch.from_numpy(targets[self._head.target])
        is_labelled_N = target_NK[:, 0] >= 0
        self._target.add(target_NK[is_labelled_N])
        if self._is_measured:
            self._student.add(student[self._head.output][is_labelled_N])
        if teacher is not None and self._head.output in teacher:
            self._teacher.add(teacher[self._head.output][is_labelled_N])
            if self._is_measured:
                self._add_comparison(student[self._head.output], teacher[self._head.output])

    def _add_comparison(self, student_NK: Tensor, teacher_NK: Tensor) -> None:
        agrees_NK = (student_NK > 0) == (teacher_NK > 0)
        self._means.add_each(self._head.key("agreement"), agrees_NK.double().mean(1))
        kl_N = _binary_kl(teacher_NK.double(), student_NK.double()).mean(1)
        self._means.add(self._head.key("kl"), float(kl_N.sum()), len(kl_N))

    def by_row(self) -> dict[str, Tensor]:
        return self._means.by_row()

    def finish(self, distributed: DistributedContext) -> dict[str, float | None]:
        key = self._head.key
        values: dict[str, float | None] = {**self._means.over_ranks(distributed)}
        target_NK = self._target.over_ranks(distributed) > 0
        occurs_K = target_NK.sum(0) > 0
        student_NK, teacher_NK = (logits.over_ranks(distributed) for logits in (self._student, self._teacher))
        has_student, has_teacher = len(student_NK) > 0, len(teacher_NK) > 0
        f1_micro, precision_K, f1_K = None, np.zeros(0), np.zeros(0)
        if has_student:
            precision_K = average_precisions(student_NK, target_NK)
            counts_3K = decision_counts(student_NK > 0, target_NK)
            f1_micro, f1_K = _f1(counts_3K.sum(1)).item(), np.where(occurs_K, _f1(counts_3K), np.nan)
            self._per_class = {"ap": precision_K, "f1": f1_K}
        teacher_map = _mean(average_precisions(teacher_NK, target_NK)) if has_teacher else None
        return {
            **values,
            key("map"): _mean(precision_K),
            key("f1_micro"): f1_micro,
            key("f1_macro"): _mean(f1_K),
            key("teacher_map"): teacher_map,
        }

    def per_class(self) -> dict[str, list[float | None]]:
        return {
            self._head.key(name): [None if np.isnan(value) else value for value in values_K.tolist()]
            for name, values_K in self._per_class.items()
        }


class _Rows:
    """Rows of K numbers, on the CPU."""

    def __init__(self, num_columns: int) -> None:
        self._num_columns = num_columns
        self._values: list[Tensor] = []

    def add(self, values_NK: Tensor) -> None:
        self._values.append(values_NK)

    def over_ranks(self, distributed: DistributedContext) -> NDArray[np.float32]:
        """[N,K] of all ranks, in their order. Every rank calls it, also one without rows."""
        values = torch.cat([torch.zeros(0, self._num_columns), *(values_NK.float() for values_NK in self._values)])
        joined = distributed.join(values.flatten().to(distributed.device))
        return joined.cpu().view(-1, self._num_columns).numpy()


def average_precisions(score_NK: NDArray[np.float32], is_positive_NK: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[K]: Σ (R_i - R_{i-1}) · P_i over the distinct scores of a class in falling order, where P_i and R_i are the
    precision and recall if all rows with at least this score are predicted; NaN for a class without positive rows."""
    return np.array([_average_precision(*pair) for pair in zip(score_NK.T, is_positive_NK.T, strict=True)], np.float64)


def _average_precision(score_N: NDArray[np.float32], is_positive_N: NDArray[np.bool_]) -> float:
    num_positive = is_positive_N.sum()
    if not num_positive:
        return float("nan")
    order_N = np.argsort(-score_N, kind="stable")
    # The last of several rows with the same score.
    last_M = np.flatnonzero(np.append(np.diff(score_N[order_N]) != 0, True))
    hits_M = is_positive_N[order_N].cumsum()[last_M]
    return float((np.diff(hits_M, prepend=0) * hits_M / (last_M + 1)).sum() / num_positive)


def decision_counts(is_predicted_NK: NDArray[np.bool_], is_positive_NK: NDArray[np.bool_]) -> NDArray[np.int64]:
    """[3,K]: true positives, false positives and false negatives of each class."""
    true_K = (is_predicted_NK & is_positive_NK).sum(0)
    return np.stack([true_K, is_predicted_NK.sum(0) - true_K, is_positive_NK.sum(0) - true_K])


def _f1(counts_3: NDArray[np.int64]) -> NDArray[np.float64]:
    """2 TP / (2 TP + FP + FN); 0 without any positive and prediction."""
    true, false_positives, false_negatives = counts_3
    return 2 * true / np.maximum(2 * true + false_positives + false_negatives, 1)


def _mean(values_K: NDArray[np.float64]) -> float | None:
    """Of those that are not NaN."""
    counted = values_K[~np.isnan(values_K)]
    return float(counted.mean()) if len(counted) else None


def _binary_kl(teacher_NK: Tensor, student_NK: Tensor) -> Tensor:
    """KL of two Bernoulli distributions, given their logits."""
    positive_NK = teacher_NK.sigmoid() * (logsigmoid(teacher_NK) - logsigmoid(student_NK))
    return positive_NK + (-teacher_NK).sigmoid() * (logsigmoid(-teacher_NK) - logsigmoid(-student_NK))
