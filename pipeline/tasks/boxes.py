"""Boxes of object detection: of an image, in its JSON, and of its views."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.tasks.task import UndecodableTargetError

_KEYS = ("boxes", "labels", "crowd")


class BadBoxesError(UndecodableTargetError):
    """Boxes that cannot be used."""


@dataclass(frozen=True, eq=False)
class Boxes:
    """The N objects of an image or of a view.

    Attributes:
        edges_N4: float64 (left, top, right, bottom) in pixels.
        label_N: int64.
        crowd_N: bool; a region of many objects, which is neither found nor missed.
    """

    edges_N4: NDArray[np.float64]
    label_N: NDArray[np.int64]
    crowd_N: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.label_N)


def parse_boxes(text: bytes) -> Boxes:
    """``{"boxes": [[x, y, w, h], …], "labels": […], "crowd": […]}``, in pixels of the upright image; crowd is optional.

    Raises:
        BadBoxesError: this is no such JSON.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadBoxesError("the boxes are no JSON") from error
    if not isinstance(document, dict) or not {"boxes", "labels"} <= document.keys() <= {*_KEYS}:
        raise BadBoxesError("the boxes are no JSON object of boxes, labels and optionally crowd")
    boxes, labels = document["boxes"], document["labels"]
    crowd = document.get("crowd", [0] * len(labels) if isinstance(labels, list) else [])
    lists: tuple[Any, ...] = (boxes, labels, crowd)
    if not all(isinstance(values, list) for values in lists) or len({*map(len, lists)}) != 1:
        raise BadBoxesError("boxes, labels and crowd are no lists of the same length")
    if not all(isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)) for box in boxes):
        raise BadBoxesError("a box is no list of four numbers x, y, width, height")
    if not all(isinstance(label, int) and not isinstance(label, bool) for label in labels):
        raise BadBoxesError("a label is no integer")
    if not all(isinstance(value, int) and value in (0, 1) for value in crowd):
        raise BadBoxesError("crowd is neither 0 nor 1")
    try:
        sides_N4, label_N = np.array(boxes, np.float64).reshape(-1, 4), np.array(labels, np.int64)
    except OverflowError as error:
        raise BadBoxesError("a number has too many digits") from error
    with np.errstate(over="ignore", invalid="ignore"):
        edges_N4 = np.concatenate([sides_N4[:, :2], sides_N4[:, :2] + sides_N4[:, 2:]], axis=1)
    return Boxes(edges_N4, label_N, np.array(crowd, np.bool_))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_boxes(boxes: Boxes, width: int, height: int, *, num_classes: int) -> str | None:
    """Why these are no boxes of an upright image of this size; None: they are."""
    left_N, top_N, right_N, bottom_N = boxes.edges_N4.T
    problems = {
        "is not finite": ~np.isfinite(boxes.edges_N4).all(axis=1),
        "has no area": (right_N <= left_N) | (bottom_N <= top_N),
        # A pixel of tolerance, because annotations are rounded.
        f"is outside of {width}×{height} pixels": (left_N < -1)
        | (top_N < -1)
        | (right_N > width + 1)
        | (bottom_N > height + 1),
        f"has a label outside of 0 to {num_classes - 1}": (boxes.label_N < 0) | (boxes.label_N >= num_classes),
    }
    for problem, wrong_N in problems.items():
        if wrong_N.any():
            number = int(np.argmax(wrong_N))
            return f"box {number} {problem}: {boxes.edges_N4[number].tolist()}, label {int(boxes.label_N[number])}"
    return None


def boxes_of_view(
    boxes: Boxes,
    box: Sequence[int],
    flip: bool,
    size: tuple[int, int],
    *,
    original: tuple[int, int],
    min_visible: float,
) -> Boxes:
    """The objects of a view, in its pixels, clipped to what it shows of the image.

    Args:
        box: (left, top, width, height) of the view in pixels of the original.
        size, original: height and width of the view, and of the original.
        min_visible: objects of which a smaller share of the area is visible are left out, and those without area.
    """
    left, top, width, height = (int(value) for value in box)
    low_2 = np.array([left, top], np.float64)
    high_2 = np.array([min(left + width, original[1]), min(top + height, original[0])], np.float64)
    clipped_N22 = np.clip(boxes.edges_N4.reshape(-1, 2, 2), low_2, high_2)
    visible_N, area_N = (_area(edges_N22) for edges_N22 in (clipped_N22, boxes.edges_N4.reshape(-1, 2, 2)))
    is_stored_N = (visible_N > 0) & (visible_N >= min_visible * area_N)
    factor_2 = np.array([size[1] / width, size[0] / height])
    edges_M4 = ((clipped_N22[is_stored_N] - low_2) * factor_2).reshape(-1, 4)
    if flip:
        edges_M4[:, [0, 2]] = size[1] - edges_M4[:, [2, 0]]
    return Boxes(edges_M4, boxes.label_N[is_stored_N], boxes.crowd_N[is_stored_N])


def _area(edges_N22: NDArray[np.float64]) -> NDArray[np.float64]:
    return (edges_N22[:, 1] - edges_N22[:, 0]).prod(axis=1)
