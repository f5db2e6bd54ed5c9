"""Boxes of views by hand; boxes that cannot be used, by their reasons."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from pipeline.tasks.boxes import BadBoxesError, Boxes, boxes_of_view, check_boxes, parse_boxes

ORIGINAL = (50, 100)  # height, width


def objects(*boxes: list[float], crowd: list[int] | None = None) -> Boxes:
    document: dict[str, Any] = {"boxes": boxes, "labels": [*range(len(boxes))]}
    return parse_boxes(json.dumps(document if crowd is None else {**document, "crowd": crowd}).encode())


def test_boxes_are_parsed_as_edges() -> None:
    boxes = objects([10, 20, 30, 5.5], [0, 0, 1, 1], crowd=[0, 1])
    assert boxes.edges_N4.tolist() == [[10, 20, 40, 25.5], [0, 0, 1, 1]]
    assert (boxes.label_N.tolist(), boxes.crowd_N.tolist()) == ([0, 1], [False, True])
    assert len(objects()) == 0
    assert check_boxes(objects(), 100, 50, num_classes=1) is None


# Box of the view (left, top, width, height), flip, and expected edges in a view of 20 x 40 pixels.
VIEWS: dict[str, tuple[tuple[int, int, int, int], bool, list[list[float]]]] = {
    "whole": ((0, 0, 100, 50), False, [[4, 8, 16, 12]]),
    "flipped": ((0, 0, 100, 50), True, [[24, 8, 36, 12]]),
    "clipped": ((20, 10, 40, 40), False, [[0, 5, 20, 10]]),
    "clipped and flipped": ((20, 10, 40, 40), True, [[20, 5, 40, 10]]),
    "padded": ((0, 0, 200, 100), False, [[2, 4, 8, 6]]),
    "elsewhere": ((50, 0, 50, 50), False, []),
    "touching": ((40, 0, 50, 50), False, []),
}


@pytest.mark.parametrize(("box", "flip", "expected"), VIEWS.values(), ids=VIEWS)
def test_boxes_follow_the_view(box: tuple[int, int, int, int], flip: bool, expected: list[list[float]]) -> None:
    view = boxes_of_view(objects([10, 20, 30, 10]), box, flip, (20, 40), original=ORIGINAL, min_visible=0)
    assert view.edges_N4.tolist() == expected
    assert len(view.label_N) == len(view.crowd_N) == len(expected)


def test_objects_of_which_too_little_is_visible_are_left_out() -> None:
    boxes = objects([0, 0, 10, 10], [25, 0, 10, 10], [35, 0, 10, 10], crowd=[0, 0, 1])
    for min_visible, labels in ((0, [1, 2]), (0.5, [1, 2]), (0.51, [2]), (1, [2])):
        view = boxes_of_view(boxes, (30, 0, 50, 50), False, (50, 50), original=ORIGINAL, min_visible=min_visible)
        assert view.label_N.tolist() == labels
        assert view.crowd_N.tolist() == [label == 2 for label in labels]


def test_a_box_beyond_its_image_is_clipped_to_the_image_in_padding_too() -> None:
    view = boxes_of_view(
        objects([99, 49, 1.5, 1.5]), (0, 0, 200, 100), False, (100, 200), original=ORIGINAL, min_visible=0
    )
    assert view.edges_N4.tolist() == [[99, 49, 100, 50]]


BAD_TEXTS = {
    "no JSON": b"{",
    "list": b"[]",
    "other keys": b'{"boxes": [], "labels": [], "masks": []}',
    "no labels": b'{"boxes": []}',
    "lengths": b'{"boxes": [[0, 0, 1, 1]], "labels": []}',
    "three numbers": b'{"boxes": [[0, 0, 1]], "labels": [0]}',
    "text": b'{"boxes": [[0, 0, 1, "1"]], "labels": [0]}',
    "label": b'{"boxes": [[0, 0, 1, 1]], "labels": [0.5]}',
    "crowd": b'{"boxes": [[0, 0, 1, 1]], "labels": [0], "crowd": [2]}',
    "large label": b'{"boxes": [[0, 0, 1, 1]], "labels": [%d]}' % 10**30,
    "large number": b'{"boxes": [[0, 0, 1, %d]], "labels": [0]}' % 10**400,
}


@pytest.mark.parametrize("text", BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_other_json_is_refused(text: bytes) -> None:
    with pytest.raises(BadBoxesError):
        parse_boxes(text)


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([0, 0, 0, 5], "no area"),
        ([5, 5, -2, 3], "no area"),
        ([90, 0, 12, 5], "outside"),
        ([-3, 0, 12, 5], "outside"),
        ([0, float("nan"), 12, 5], "not finite"),
        ([0, 0, float("inf"), 5], "not finite"),
        ([1e308, 0, 1e308, 5], "not finite"),
        ([float("-inf"), 0, float("inf"), 5], "not finite"),
    ],
)
def test_a_bad_box_has_a_reason(box: list[float], reason: str) -> None:
    assert reason in str(check_boxes(objects([0, 0, 5, 5], box), 100, 50, num_classes=2))
    assert check_boxes(objects([0, 0, 100.5, 50]), 100, 50, num_classes=2) is None


def test_labels_are_classes() -> None:
    boxes = objects([0, 0, 5, 5], [0, 0, 5, 5])
    assert check_boxes(boxes, 100, 50, num_classes=2) is None
    assert "label" in str(check_boxes(boxes, 100, 50, num_classes=1))
    assert np.isfinite(boxes.edges_N4).all()
