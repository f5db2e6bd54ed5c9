"""The confusion matrix of segmentation: hand numbers, sums over parts, and counts that a recount refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from pipeline.tasks import task_of
from pipeline.tasks.confusion import class_iou, confusion_matrix, confusion_of, segmentation_metrics
from pipeline.tasks.task import Task
from schemas.cache_format import Statistics
from schemas.config import DataConfig

K, IGNORE = 3, 255


def task(**keys: Any) -> Task:
    return task_of(DataConfig.model_validate({"task": "segmentation", "num_classes": K, **keys}))


def logits_of(classes_Nhw: NDArray[Any]) -> NDArray[np.float32]:
    """Logits whose largest class is this."""
    return np.eye(K, dtype=np.float32)[classes_Nhw].transpose(0, 3, 1, 2)


def test_rows_are_classes_of_the_mask_and_ignored_pixels_count_nowhere() -> None:
    mask, predicted = np.array([0, 0, 1, 2, IGNORE]), np.array([0, 1, 1, 0, 2])
    assert confusion_matrix(mask, predicted, K).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_metrics_are_those_of_all_pixels_over_the_classes_that_occur() -> None:
    """Class 0: 1 of 3 pixels; class 1: 1 of 2; class 2 is predicted nowhere, and in one mask."""
    confusion = np.array([[1, 1, 0], [0, 1, 0], [1, 0, 0]])
    assert class_iou(confusion).tolist() == pytest.approx([1 / 3, 1 / 2, 0])
    assert segmentation_metrics(confusion) == {"mIoU": pytest.approx(5 / 18), "pixel accuracy": 1 / 2}
    confusion[2, 0] = 0
    assert np.isnan(class_iou(confusion)[2])
    assert segmentation_metrics(confusion)["mIoU"] == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert segmentation_metrics(np.zeros((K, K), np.int64)) == {"mIoU": None, "pixel accuracy": None}


def test_a_position_of_the_grid_counts_the_pixel_that_contains_its_centre() -> None:
    """Six by four pixels on a grid of two by two: the centres lie in rows 1 and 4, columns 1 and 3."""
    mask = np.full((1, 6, 4), IGNORE, np.uint8)
    mask[0, [1, 1, 4, 4], [1, 3, 1, 3]] = [0, 1, 2, IGNORE]
    counter = task().accumulate()
    counter.add({"logits": logits_of(np.array([[[0, 1], [0, 0]]]))}, {"mask": mask})
    statistics = Statistics(**counter.result())
    assert confusion_of(statistics, K).tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]
    assert statistics.sums == {"confusion/0/0": 1, "confusion/1/1": 1, "confusion/2/0": 1}
    assert task().teacher_metrics(statistics)["pixel accuracy"] == pytest.approx(2 / 3)


def test_views_without_a_mask_are_not_counted() -> None:
    counter = task().accumulate()
    mask = np.stack([np.zeros((2, 2), np.uint8), np.full((2, 2), IGNORE, np.uint8)])
    counter.add({"logits": logits_of(np.zeros((2, 2, 2), np.int64))}, {"mask": mask})
    assert counter.result() == {"labelled": 1, "sums": {"confusion/0/0": 4.0}}
    assert task().teacher_metrics(Statistics()) == {"mIoU": None, "pixel accuracy": None}


@given(arrays(np.uint8, (4, 3, 3), elements=st.sampled_from([0, 1, 2, IGNORE])), st.permutations(range(4)))
def test_parts_in_any_order_and_all_rows_at_once_have_the_same_sums(
    mask_NHW: NDArray[np.uint8], order: list[int]
) -> None:
    predicted = np.random.default_rng(0).integers(0, K, (4, 3, 3))
    logits, fold = logits_of(predicted), task().accumulate()
    for row in order:
        part = task().accumulate()
        part.add({"logits": logits[[row]]}, {"mask": mask_NHW[[row]]})
        # As it is read from a commit.
        fold.add_part(Statistics.model_validate_json(Statistics(**part.result()).model_dump_json()))
    together = task().accumulate()
    together.add({"logits": logits}, {"mask": mask_NHW})
    assert fold.result() == together.result()


@pytest.mark.parametrize("domain", [None, "domain.txt"])
@pytest.mark.parametrize(
    ("labelled", "sums", "problem"),
    [
        (2, {"confusion/0/0": 8.0}, None),
        (1, {"confusion/0/0": 3.0}, None),
        (3, {"confusion/0/0": 8.0}, "more masks"),
        (2, {"confusion/0/0": 5.0, "confusion/2/1": 4.0}, "more pixels"),
        (2, {"confusion/0/3": 1.0}, "wrong cell"),
        (2, {"confusion/0/0": -1.0}, "wrong cell"),
        (2, {"confusion/0/0": 1.5}, "wrong cell"),
        (2, {"confusion/0": 1.0}, "wrong cell"),
    ],
)
def test_a_recount_without_masks_refuses_more_than_the_index_has(
    labelled: int, sums: dict[str, float], problem: str | None, domain: str | None
) -> None:
    """Three rows, two with a mask, under a view of two by two positions."""
    targets: dict[str, Any] = {
        "target_offset": np.array([512, -1, 2048]),
        "target_size": np.array([9, -1, 9], np.int32),
        "target_hash": np.array([1, 0, 2], np.uint64),
    }
    if domain is not None:
        targets["domain"] = np.array([None] * 3, object)
    recount = task(domain=domain).recount(targets, mix_group=16, outputs=["logits"])
    for rows in (slice(0, 2), slice(2, 3)):
        recount.add_outputs("logits", np.zeros((rows.stop - rows.start, K, 2, 2), np.float32), rows, exact=True)
        recount.add_view(np.ones(rows.stop - rows.start, np.float32), rows)
    problems: list[str] = []
    stated = Statistics(labelled=labelled, sums=sums)
    recount.compare(stated, lambda what, got, expected: problems.append(what) if got != expected else None)
    assert [problem is not None and problem in what for what in problems] == [True] * (problem is not None)
