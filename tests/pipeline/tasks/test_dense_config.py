"""Keys of a config with masks or boxes: their defaults, and those that contradict the task."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from pipeline.core.config_loading import parse_config
from schemas.config import Config
from tests.errors import raises

SCALED = {"kind": "scale_crop", "size": [64, 128]}


def config(data: dict[str, Any], **sections: Any) -> Config:
    return parse_config(yaml.safe_dump({"data": data, **sections}), where="config")


def test_defaults_are_those_of_the_task() -> None:
    masks = config({"task": "segmentation", "num_classes": 19}, views=SCALED)
    assert (masks.data.image, masks.data.label, masks.data.ignore_index) == ("jpg;jpeg;webp", "mask.png;png", 255)
    assert (masks.views.eval_box, masks.views.mix_group) == ("letterbox", 16)
    boxes = config({"task": "detection", "classes": ["car"]}, views={**SCALED, "mix_group": 8})
    assert (boxes.data.image, boxes.data.label, boxes.data.num_classes) == ("jpg;jpeg;png;webp", "json", 1)
    assert (boxes.views.eval_box, boxes.views.mix_group) == ("letterbox", 8)
    plain = config({"num_classes": 19}, views=SCALED)
    assert (plain.data.label, plain.views.eval_box, plain.views.mix_group) == ("cls", "centre", 256)
    # An index needs no views.
    assert config({"task": "segmentation", "num_classes": 2}).views == Config().views


@pytest.mark.parametrize(
    "data",
    [
        {"task": "segmentation"},
        {"task": "segmentation", "num_classes": 1},
        {"num_classes": 1},
        {"task": "detection", "num_classes": 3, "label_offset": 1},
        {"task": "segmentation", "num_classes": 3, "label_map": {"1": 0}},
        {"task": "detection", "num_classes": 3, "ignore_index": 0},
    ],
)
def test_keys_that_contradict_the_task_are_refused(data: dict[str, Any]) -> None:
    with raises("config.conflicting-values"):
        config(data)


@pytest.mark.parametrize("task", ["segmentation", "detection"])
@pytest.mark.parametrize(
    "views",
    [
        {},
        {"kind": "crop", "size": 64},
        {"kind": "function_matching", "size": 64, "cutmix": 0.5},
        {"kind": "eval", "eval_box": "centre"},
        {**SCALED, "eval_box": "centre"},
        {**SCALED, "randaugment": {}},
        {**SCALED, "erasing": {}},
    ],
)
def test_views_without_masks_and_boxes_are_refused(task: str, views: dict[str, Any]) -> None:
    with raises("config.conflicting-values"):
        config({"task": task, "num_classes": 3}, views=views)


@pytest.mark.parametrize("views", [{"kind": "eval"}, {**SCALED, "jitter": {}, "flip": 0.0}])
def test_views_with_masks_and_boxes_are_accepted(views: dict[str, Any]) -> None:
    assert config({"task": "segmentation", "num_classes": 3}, views=views).views.kind == views["kind"]
