"""The memory layout of a student: channels-last, unless torch's backward pass of one of its layers can crash there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.models import load_model, unsafe_in_channels_last
from schemas.config import StudentConfig
from tests.pipeline.student.conftest import Replay
from tests.pipeline.student.runs import run_config, trainer_of

CPU = torch.device("cpu")


def resnet(*widths: int) -> dict[str, Any]:
    kwargs = {"depth": 8, "widths": list(widths)}
    return {"model": "python:pipeline.models.cifar:resnet", "kwargs": kwargs, "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.mark.parametrize(("widths", "num_layers"), [((16, 16, 32, 64), 0), ((8, 8, 16, 32), 1), ((3, 4, 8, 9), 2)])
def test_narrow_convolutions_with_a_stride_are_found(widths: tuple[int, ...], num_layers: int) -> None:
    config = StudentConfig.model_validate(resnet(*widths))
    network = load_model(config, widths={"logits": 10}, size=32).module.network
    assert len(unsafe_in_channels_last(network, CPU)) == num_layers


@pytest.mark.parametrize(
    ("layer", "is_unsafe"),
    [
        (nn.Conv2d(3, 4, 1, stride=2), True),
        (nn.Conv2d(8, 64, 1, stride=2, bias=False), True),
        (nn.Conv2d(8, 8, 1, stride=(1, 2)), True),
        (nn.Conv2d(1, 4, 1, stride=2), True),
        (nn.Conv2d(9, 4, 1, stride=2), False),
        (nn.Conv2d(8, 8, 1), False),
        (nn.Conv2d(8, 8, 3, stride=2), False),
    ],
    ids=str,
)
def test_only_strided_1x1_convolutions_of_up_to_8_channels_are(layer: nn.Conv2d, is_unsafe: bool) -> None:
    assert unsafe_in_channels_last(layer, CPU) == ([""] if is_unsafe else [])
    assert unsafe_in_channels_last(layer, torch.device("cuda")) == []


NARROW, WIDE = (8, 8, 16, 32), (16, 16, 32, 64)


@pytest.mark.parametrize(
    ("widths", "option", "channels_last", "warned"),
    [
        (NARROW, None, False, "in contiguous memory"),
        (NARROW, True, True, "train.channels_last is true"),
        (NARROW, False, False, "in contiguous memory"),
        (WIDE, None, True, ""),
        (WIDE, False, False, ""),
    ],
)
def test_the_config_or_the_network_decides_the_memory_layout(
    replays: Replay, tmp_path: Path, widths: tuple[int, ...], option: bool | None, channels_last: bool, warned: str
) -> None:
    """One epoch; checks the layout and not a crash, since 8 channels crash only at 64 pixels and with AVX-512."""
    train = {"epochs": 1, "tail": "short", "global_batch_size": 7, "channels_last": option}
    config = run_config(replays("crop").config, tmp_path, student=resnet(*widths), train=train)
    texts: list[str] = []
    trainer = trainer_of(config, report=lambda event: texts.append(str(event.get("text", ""))))
    layouts: set[bool] = set()
    student = trainer.setup.student.module
    student.register_forward_pre_hook(
        lambda _, images: layouts.add(images[0].is_contiguous(memory_format=torch.channels_last))
    )
    trainer.run()
    trainer.setup.close()
    assert layouts == {channels_last}
    weights = [layer.weight for layer in student.modules() if isinstance(layer, nn.Conv2d)]
    wide = [weight for weight in weights if min(weight.shape[1:]) > 1]
    assert wide
    assert {weight.is_contiguous(memory_format=torch.channels_last) for weight in wide} == {channels_last}
    (text,) = [text for text in texts if "channels-last memory" in text] or [""]
    assert warned in text
    assert bool(text) == bool(warned)
