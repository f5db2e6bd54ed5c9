"""Metrics by head and by domain against scikit-learn, torchmetrics and loops over rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score, recall_score
from torchmetrics.functional.classification import multilabel_average_precision, multilabel_f1_score

from pipeline.student.distributed import DistributedContext
from pipeline.student.evaluation.metrics import EvaluationScope, MetricSet, MetricSums, metrics_of
from pipeline.student.evaluation.metrics.domains import metrics_by_domain
from schemas.config import DataConfig
from tests.ranks import group, run_two_ranks
from tests.tolerances import ulps

CPU = torch.device("cpu")
# scikit-learn warns that class 6 is predicted and has no rows.
pytestmark = pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")

HEADS = {
    "pair": {"num_classes": 7},
    "even": {"num_classes": 2},
    "tags": {"num_classes": 5, "kind": "multilabel"},
}
DATA = DataConfig.model_validate({"task": "heads", "label": "json", "heads": HEADS})
N = 200
CLASS_METRICS = ("top1", "balanced_accuracy", "ece", "agreement", "kl", "teacher_top1")
TAG_METRICS = ("map", "f1_micro", "f1_macro", "agreement", "kl", "teacher_map")

Rows = tuple[dict[str, Any], dict[str, Any], dict[str, NDArray[Any]]]


def rows(seed: int = 0, num: int = N) -> Rows:
    """Outputs of student and teacher, and targets. Class 6 of ``pair`` and class 4 of ``tags`` do not occur."""
    rng = np.random.default_rng(seed)

    def outputs() -> dict[str, torch.Tensor]:
        # In steps, so that there are ties; between -4 and 4, since torchmetrics takes the sigmoid in fp32.
        widths = {"logits.pair": 7, "logits.even": 2, "logits.tags": 5, "embedding": 3}
        values = {name: rng.integers(-16, 17, (num, width)) / 4 for name, width in widths.items()}
        return {name: torch.from_numpy(value).float() for name, value in values.items()}

    tags = rng.integers(0, 2, (num, 5)).astype(np.int8)
    tags[:, 4] = 0
    tags[rng.random(num) < 0.2] = -1
    label_pair = rng.integers(-1, 6, num).astype(np.int32)
    domains = np.array(["noise", "blur", None, "fog"], object)[rng.integers(0, 4, num)]
    targets = {
        "label_pair": label_pair,
        "label_even": np.full(num, -1, np.int32),
        "label_tags": tags,
        "domain": domains,
    }
    return outputs(), outputs(), targets


def summed(metrics: MetricSet, parts: list[Rows], scope: EvaluationScope | None = None) -> MetricSums:
    sums = metrics.sums(DATA, scope or EvaluationScope(), CPU)
    for student, teacher, targets in parts:
        sums.add(student, teacher, targets)
    return sums


def batches(all_rows: Rows, size: int = 64) -> list[Rows]:
    row_N = np.arange(len(all_rows[2]["domain"]))
    return [chosen(all_rows, row_N // size == number) for number in range(-(-len(row_N) // size))]


def chosen(all_rows: Rows, is_chosen_N: Any) -> Rows:
    student, teacher, targets = ({name: value[is_chosen_N] for name, value in part.items()} for part in all_rows)
    return student, teacher, targets


def expected_of_pair(student: Mapping[str, Any], teacher: Mapping[str, Any], targets: Mapping[str, Any]) -> Any:
    logits_NK, teacher_NK, label_N = (
        v.astype(np.float64)
        for v in (student["logits.pair"].numpy(), teacher["logits.pair"].numpy(), targets["label_pair"])
    )
    labelled_N = label_N >= 0
    label_M, class_M = label_N[labelled_N], logits_NK.argmax(1)[labelled_N]
    kl = 0.0
    for p_K, q_K in zip(teacher_NK, logits_NK, strict=True):
        p_K, q_K = np.exp(p_K) / np.exp(p_K).sum(), np.exp(q_K) / np.exp(q_K).sum()
        kl += (p_K * np.log(p_K / q_K)).sum() / len(logits_NK)
    return {
        "pair/top1": (class_M == label_M).mean(),
        "pair/balanced_accuracy": balanced_accuracy_score(label_M, class_M),
        "pair/agreement": (logits_NK.argmax(1) == teacher_NK.argmax(1)).mean(),
        "pair/kl": kl,
        "pair/teacher_top1": (teacher_NK.argmax(1)[labelled_N] == label_M).mean(),
    }


def expected_of_tags(student: Mapping[str, Any], teacher: Mapping[str, Any], targets: Mapping[str, Any]) -> Any:
    logits_NK, teacher_NK, target_NK = (
        v.astype(np.float64)
        for v in (student["logits.tags"].numpy(), teacher["logits.tags"].numpy(), targets["label_tags"])
    )
    labelled_N = target_NK[:, 0] >= 0
    target_MK, logits_MK = target_NK[labelled_N][:, :4], logits_NK[labelled_N]
    all_MK = target_NK[labelled_N]
    kl = 0.0
    for t, s in zip(teacher_NK.flat, logits_NK.flat, strict=True):
        p, q = 1 / (1 + math.exp(-t)), 1 / (1 + math.exp(-s))
        kl += (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) / logits_NK.size
    return {
        "tags/map": average_precision_score(target_MK, logits_MK[:, :4], average="macro"),
        "tags/f1_micro": f1_score(all_MK, logits_MK > 0, average="micro"),
        "tags/f1_macro": f1_score(target_MK, logits_MK[:, :4] > 0, average="macro"),
        "tags/agreement": ((teacher_NK > 0) == (logits_NK > 0)).mean(),
        "tags/kl": kl,
        "tags/teacher_map": average_precision_score(target_MK, teacher_NK[labelled_N][:, :4], average="macro"),
    }


def approximately(expected: Mapping[Any, float]) -> Any:
    # Means of fp64 numbers over N rows of up to 7 classes; KL is a difference of logarithms below 16.
    return pytest.approx(expected, rel=0, abs=16 * ulps(10 * N, dtype=torch.float64))


def test_metrics_of_class_and_multilabel_heads_are_those_of_scikit_learn() -> None:
    all_rows = rows()
    values = summed(metrics_of(DATA), batches(all_rows)).finish(DistributedContext())
    expected = {**expected_of_pair(*all_rows), **expected_of_tags(*all_rows)}
    assert {key: values[key] for key in expected} == approximately(expected)
    unlabelled = ("top1", "balanced_accuracy", "ece", "teacher_top1")
    assert [values[f"even/{name}"] for name in unlabelled] == [None] * 4
    assert values["even/agreement"] is not None


def test_metrics_of_a_multilabel_head_are_those_of_torchmetrics() -> None:
    student, _, targets = all_rows = rows(1)
    values = summed(metrics_of(DATA), batches(all_rows)).finish(DistributedContext())
    labelled_N = targets["label_tags"][:, 0] >= 0
    # It divides by zero for a class that does not occur.
    logits_MK = student["logits.tags"][labelled_N][:, :4].double()
    target_MK = torch.from_numpy(targets["label_tags"][labelled_N][:, :4]).long()
    expected = {
        "tags/map": multilabel_average_precision(logits_MK, target_MK, num_labels=4, average="macro").item(),
        "tags/f1_macro": multilabel_f1_score(logits_MK, target_MK, num_labels=4, average="macro").item(),
    }
    assert {key: values[key] for key in expected} == pytest.approx(expected, rel=0, abs=ulps(10 * N))


def test_numbers_of_each_class() -> None:
    student, _, targets = all_rows = rows()
    sums = summed(metrics_of(DATA), batches(all_rows))
    sums.finish(DistributedContext())
    tables = sums.per_class()
    label_N = targets["label_pair"]
    recall_K = recall_score(
        label_N[label_N >= 0],
        student["logits.pair"].numpy().argmax(1)[label_N >= 0],
        average=cast("str", None),
        labels=range(6),
    )
    assert tables["pair/recall"] == [*np.asarray(recall_K).tolist(), None]
    assert tables["even/recall"] == [None, None]
    labelled_N = targets["label_tags"][:, 0] >= 0
    pair = targets["label_tags"][labelled_N][:, :4], student["logits.tags"].numpy()[labelled_N][:, :4]
    precisions = average_precision_score(*pair, average=cast("str", None))
    f1_K = f1_score(pair[0], pair[1] > 0, average=cast("str", None))
    for name, expected_K in (("ap", precisions), ("f1", f1_K)):
        *values_K, last = tables[f"tags/{name}"]
        assert dict(enumerate(values_K)) == approximately(dict(enumerate(np.asarray(expected_K))))
        assert last is None


def test_the_keys_of_heads() -> None:
    metrics = metrics_of(DATA)
    pair = ["pair/top1", "pair/top5", *(f"pair/{name}" for name in CLASS_METRICS[1:])]
    # Top-5 of two classes would be 1.
    even, tags = [f"even/{name}" for name in CLASS_METRICS], [f"tags/{name}" for name in TAG_METRICS]
    assert [metric.key for metric in metrics.metrics] == [*even, *pair, *tags, "cosine"]
    assert metrics["pair/balanced_accuracy"].heading == "balanced accuracy (pair), %"
    agreements = ["even/agreement", "pair/agreement", "tags/agreement"]
    assert [*metrics.selection] == ["even/top1", "pair/top1", "tags/map", *agreements, "cosine"]
    assert metrics.table[3:6] == ("pair/top1", "pair/balanced_accuracy", "pair/agreement")
    assert metrics["tags/map"].teacher_key == "tags/teacher_map"
    values = summed(metrics, batches(rows())).finish(DistributedContext())
    assert {metric.key for metric in metrics.metrics} <= values.keys()


def test_an_untrained_head_is_not_measured_and_does_not_select() -> None:
    metrics, scope = metrics_of(DATA), EvaluationScope(frozenset({"logits.pair", "logits.tags"}))
    sums = summed(metrics, batches(rows()), scope)
    values = sums.finish(DistributedContext())
    measured = {key for key, value in values.items() if value is not None}
    assert measured == {"even/agreement", "even/kl", "pair/teacher_top1", "tags/teacher_map"}
    assert [*sums.per_class()] == ["even/recall"]
    selected = metrics.selected_without({"targets", *scope.missing(teacher=True)})
    assert selected is not None
    assert selected.key == "even/agreement"
    assert metrics.teacher_outputs(scope) == {"logits.pair", "logits.even", "logits.tags"}


def test_a_teacher_without_a_head_is_not_compared_in_it() -> None:
    student, teacher, targets = rows()
    sums = metrics_of(DATA).sums(DATA, EvaluationScope(), CPU)
    sums.add(student, {"logits.even": teacher["logits.even"]}, targets)
    values = sums.finish(DistributedContext())
    assert values["pair/top1"] is not None
    assert [values[f"pair/{name}"] for name in ("agreement", "kl", "teacher_top1")] == [None] * 3
    assert values["tags/teacher_map"] is None
    assert values["even/agreement"] is not None


def test_values_of_rows_have_the_metrics_as_their_means() -> None:
    sums = summed(metrics_of(DATA), batches(rows()))
    values, by_row = sums.finish(DistributedContext()), sums.by_row()
    pair = {"pair/top1", "pair/balanced_accuracy", "pair/agreement"}
    assert by_row.keys() == {*pair, "even/top1", "even/balanced_accuracy", "even/agreement", "tags/agreement"}
    assert all(len(value_N) == N for value_N in by_row.values())
    means = {key: value_N.nanmean().item() for key, value_N in by_row.items() if values[key] is not None}
    assert means == approximately({key: values[key] or 0.0 for key in means})
    assert by_row["even/balanced_accuracy"].isnan().all()


def test_metrics_of_each_domain_are_those_of_its_rows_alone() -> None:
    all_rows, metrics = rows(), metrics_by_domain(metrics_of(DATA))
    sums = summed(metrics, batches(all_rows))
    values, tables = sums.finish(DistributedContext()), sums.by_domain()
    domain_N = all_rows[2]["domain"]
    assert [*tables] == ["blur", "fog", "noise"]
    for domain, table in tables.items():
        is_chosen_N = domain_N == domain
        alone = summed(metrics_of(DATA), batches(chosen(all_rows, is_chosen_N))).finish(DistributedContext())
        assert table["num_rows"] == is_chosen_N.sum()
        assert table.keys() - {"num_rows"} == {metric.key for metric in metrics_of(DATA).metrics}
        assert {key: table[key] for key in alone} == approximately_or_none(alone)
        expected = expected_of_pair(*chosen(all_rows, is_chosen_N))
        assert {key: table[key] for key in expected} == approximately(expected)
    for key in ("pair/top1", "tags/map"):
        assert values[f"worst_domain/{key}"] == min(table[key] or 0.0 for table in tables.values())
    assert values["worst_domain/even/top1"] is None
    overall = summed(metrics_of(DATA), batches(all_rows)).finish(DistributedContext())
    assert {key: values[key] for key in overall} == overall
    assert [metric.key for metric in metrics.metrics][-5:] == [f"worst_domain/{key}" for key in metrics.worst_domain]
    assert metrics["worst_domain/pair/top1"].text(0.5) == "50.0 %"


def approximately_or_none(values: Mapping[str, float | None]) -> dict[str, Any]:
    # torchmetrics sums confidences in fp32.
    return {
        key: None if value is None else pytest.approx(value, rel=0, abs=ulps(10 * N)) for key, value in values.items()
    }


def _measure(rendezvous: Path, rank: int) -> tuple[dict[str, Any], ...]:
    with group(rendezvous, rank) as distributed:
        all_rows = rows()
        is_chosen_N = np.arange(N) % 3 == rank if rank else np.arange(N) % 3 != 1
        # One rank has no row of a domain.
        is_chosen_N = is_chosen_N if rank else is_chosen_N | (all_rows[2]["domain"] == "fog")
        if rank:
            is_chosen_N = is_chosen_N & (all_rows[2]["domain"] != "fog")
        sums = summed(metrics_by_domain(metrics_of(DATA)), batches(chosen(all_rows, is_chosen_N)))
        return sums.finish(distributed), sums.per_class(), sums.by_domain()


@pytest.mark.long
def test_two_ranks_measure_what_one_does(tmp_path: Path) -> None:
    values, per_class, by_domain = run_two_ranks(_measure, tmp_path)
    sums = summed(metrics_by_domain(metrics_of(DATA)), batches(rows()))
    assert values == approximately_or_none(sums.finish(DistributedContext()))
    assert per_class == {key: approximately_each(values) for key, values in sums.per_class().items()}
    assert by_domain == {domain: approximately_or_none(table) for domain, table in sums.by_domain().items()}


def approximately_each(values: list[float | None]) -> list[Any]:
    return [*approximately_or_none(dict(zip(map(str, range(len(values))), values, strict=True))).values()]
