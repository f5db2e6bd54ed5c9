"""The confusion matrix of segmentation: pixels by the class of the mask and the predicted one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.tasks.task import LOGITS, Recount, StatisticsAccumulator, Targets, TeacherOutputs
from pipeline.tasks.view_geometry import source_positions
from schemas.cache_format import Statistics

MASK = "mask"
"""The target of a view: class indexes [h,w]."""
MEAN_IOU, PIXEL_ACCURACY = "mIoU", "pixel accuracy"
_PREFIX = "confusion/"


def confusion_matrix(mask_M: NDArray[Any], predicted_M: NDArray[Any], num_classes: int) -> NDArray[np.int64]:
    """int64 [K,K] of M pixels: rows are classes of the mask, columns predicted classes.

    Args:
        mask_M: pixels of another value than 0 to K - 1 count nowhere.
    """
    counted = mask_M < num_classes
    pairs = mask_M[counted].astype(np.int64) * num_classes + predicted_M[counted]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_iou(confusion_KK: NDArray[np.int64]) -> NDArray[np.float64]:
    """[K]: intersection over union of each class over all pixels (not a mean over images); NaN for a class that is
    neither in a mask nor predicted."""
    hits_K = np.diagonal(confusion_KK)
    union_K = confusion_KK.sum(0) + confusion_KK.sum(1) - hits_K
    return np.where(union_K > 0, hits_K / np.maximum(union_K, 1), np.nan)


def segmentation_metrics(confusion_KK: NDArray[np.int64]) -> dict[str, float | None]:
    """Mean IoU over the classes that are in a mask or predicted, and the share of correct pixels; None: no pixels."""
    num_pixels = int(confusion_KK.sum())
    if not num_pixels:
        return {MEAN_IOU: None, PIXEL_ACCURACY: None}
    hits = int(np.trace(confusion_KK))
    return {MEAN_IOU: float(np.nanmean(class_iou(confusion_KK))), PIXEL_ACCURACY: hits / num_pixels}


class ConfusionSum(StatisticsAccumulator):
    """Counts one pixel of the mask at each position of the grid, the one that contains its centre: there a bilinear
    map has the logits of the position. Bilinear maps of all pixels would take longer than many teachers.

    ``labelled`` counts views with a mask, and ``sums`` has the cells of the matrix that are not 0:
    ``confusion/CLASS/PREDICTED``.
    """

    def __init__(self, num_classes: int) -> None:
        self._confusion_KK = np.zeros((num_classes, num_classes), np.int64)
        self._num_labelled = 0

    def add(self, outputs: TeacherOutputs, targets: Targets) -> None:
        logits_NKhw, mask_NHW = outputs[LOGITS], targets[MASK]
        rows, columns = (
            source_positions(0, length, num, length)
            for length, num in zip(mask_NHW.shape[1:], logits_NKhw.shape[2:], strict=True)
        )
        mask_Nhw, num_classes = mask_NHW[:, rows[:, None], columns], len(self._confusion_KK)
        self._confusion_KK += confusion_matrix(mask_Nhw.ravel(), logits_NKhw.argmax(1).ravel(), num_classes)
        self._num_labelled += int((mask_NHW < num_classes).any((1, 2)).sum())

    def add_part(self, statistics: Statistics) -> None:
        self._num_labelled += statistics.labelled
        self._confusion_KK += confusion_of(statistics, len(self._confusion_KK))

    def result(self) -> dict[str, Any]:
        cells = zip(*np.nonzero(self._confusion_KK), strict=True)
        sums = {f"{_PREFIX}{row}/{column}": float(self._confusion_KK[row, column]) for row, column in cells}
        return {"labelled": self._num_labelled, "sums": sums}


def confusion_of(statistics: Statistics, num_classes: int) -> NDArray[np.int64]:
    """int64 [K,K], as ``confusion_matrix``.

    Raises:
        ValueError: a cell is no whole number, or that of classes beyond K.
    """
    confusion_KK = np.zeros((num_classes, num_classes), np.int64)
    for key, count in statistics.sums.items():
        if key.startswith(_PREFIX):
            row, column = (int(number) for number in key.removeprefix(_PREFIX).split("/"))
            if not (0 <= row < num_classes and 0 <= column < num_classes and count == int(count) >= 0):
                raise ValueError(f"{key} is {count}")
            confusion_KK[row, column] = int(count)
    return confusion_KK


class ConfusionRecount(Recount):
    """Masks are in the shards, which ``verify`` may not reach: without them, counts have upper bounds."""

    def __init__(self, has_target_N: NDArray[np.bool_], num_classes: int, *, has_logits: bool) -> None:
        self._has_target_N, self._num_classes, self._has_logits = has_target_N, num_classes, has_logits
        self._num_labelled = self._num_positions = 0

    def add_view(self, mix_lambda_M: NDArray[np.float32], rows: slice) -> None:
        del mix_lambda_M
        self._num_labelled += int(self._has_target_N[rows].sum())

    def add_outputs(self, name: str, values: NDArray[np.float32], rows: slice, *, exact: bool) -> None:
        del exact
        if name == LOGITS:
            self._num_positions += int(self._has_target_N[rows].sum()) * int(np.prod(values.shape[2:]))

    def compare(self, stated: Statistics, expect: Callable[[str, object, object], object]) -> None:
        labelled = min(stated.labelled, self._num_labelled)
        expect("the commit counts more masks than the index has", stated.labelled, labelled)
        try:
            num_pixels = int(confusion_of(stated, self._num_classes).sum())
        except ValueError as error:
            expect("the commit's confusion matrix has a wrong cell", str(error), "counts of pixels by two classes")
            return
        if self._has_logits:
            most = min(num_pixels, self._num_positions)
            expect("the commit counts more pixels than the masks have", num_pixels, most)
