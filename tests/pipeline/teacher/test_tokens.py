"""Patch tokens of a teacher: the positions of a layer, in every layout, pooled to a grid."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core.errors import ConfigError, ModelError
from pipeline.teacher.inference import Teacher, load_teacher
from pipeline.teacher.tokens import TokenRequest
from schemas.config import TeacherConfig
from tests.errors import raises
from tests.tolerances import magnitude_of, reordered, ulps

SIZE = 64
VIT: dict[str, Any] = {"model": "timm/test_vit", "kwargs": {"img_size": SIZE, "reg_tokens": 3}}
# Averages its positions, and normalises the average: `norm` is the identity.
POOLED_VIT: dict[str, Any] = {**VIT, "model": "timm/test_vit2"}
RESNET = {
    "model": "python:pipeline.models.cifar:resnet",
    "kwargs": {"depth": 8, "widths": [4, 4, 6, 7]},
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.25],
}


def teacher(layer: str | None, grid: int | None, **keys: Any) -> Teacher:
    config = TeacherConfig.model_validate({"weights": "random", "batch_size": 4, **keys})
    request = TokenRequest(layer, grid, "teacher.tokens_layer", "cache.tokens_grid")
    return load_teacher(config, widths={"logits": 10}, size=SIZE, device=torch.device("cpu"), tokens=request)


def pixels(count: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(3).integers(0, 256, (count, 3, SIZE, SIZE), dtype=np.uint8))


def images(teacher: Teacher, pixels_NCHW: Tensor) -> Tensor:
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (teacher.loaded.input.mean, teacher.loaded.input.std)
    )
    return (pixels_NCHW.float() / 255 - mean) / std


def pooled(map_NHWD: NDArray[np.float32], grid: int) -> NDArray[np.float64]:
    """[N,P,D], one window after another."""
    side = map_NHWD.shape[1] // grid
    windows = [
        map_NHWD[:, y * side : (y + 1) * side, x * side : (x + 1) * side].astype(np.float64).mean((1, 2))
        for y in range(grid)
        for x in range(grid)
    ]
    return np.stack(windows, axis=1)


@torch.no_grad()
@pytest.mark.parametrize(("grid", "keys", "num_prefix"), [(None, VIT, 4), (2, VIT, 4), (1, POOLED_VIT, 3)])
def test_tokens_of_a_vit_are_its_features_without_class_and_register_tokens(
    grid: int | None, keys: dict[str, Any], num_prefix: int
) -> None:
    vit, pixels_NCHW = teacher(None, grid, **keys), pixels(5)
    network: Any = vit.module.network
    features_NTD = network.forward_features(images(vit, pixels_NCHW))
    assert features_NTD.shape == (5, num_prefix + 16, 64)
    expected = pooled(features_NTD[:, num_prefix:].reshape(5, 4, 4, 64).numpy(), grid or 4)
    found = vit.infer(pixels_NCHW)
    # Batches of 4 and of all 5 rows.
    tolerance = reordered(10_000, magnitude_of(expected))
    np.testing.assert_allclose(found["tokens"], expected, rtol=0, atol=tolerance)
    plain = load_teacher(
        TeacherConfig.model_validate({"weights": "random", "batch_size": 4, **keys}),
        widths={"logits": 10},
        size=SIZE,
        device=torch.device("cpu"),
    ).infer(pixels_NCHW)
    assert found.keys() - plain.keys() == {"tokens"}
    assert all(np.array_equal(found[name], values) for name, values in plain.items())


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tokens_of_a_convolutional_network_are_means_over_windows_of_its_map(precision: str) -> None:
    resnet, pixels_NCHW = teacher("layer2", 8, precision=precision, **RESNET), pixels(4)
    network: Any = resnet.module.network
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        x = images(resnet, pixels_NCHW).contiguous(memory_format=torch.channels_last)
        map_NDHW = network.layer2(network.layer1(torch.relu(network.bn1(network.conv1(x))))).float()
    assert map_NDHW.shape == (4, 6, 32, 32)
    expected = pooled(map_NDHW.permute(0, 2, 3, 1).numpy(), 8)
    found = resnet.infer(pixels_NCHW)["tokens"]
    assert (found.shape, found.dtype) == ((4, 64, 6), np.float32)
    np.testing.assert_allclose(found, expected, rtol=0, atol=ulps(20, magnitude_of(map_NDHW)))


def test_a_grid_that_does_not_divide_the_side_of_the_layer_is_refused() -> None:
    with raises("config.tokens-grid", ConfigError, where="cache.tokens_grid", expected="one of 1, 2, 4, or null"):
        teacher(None, 3, **VIT)
    with raises("config.tokens-grid", ConfigError):
        teacher(None, 8, **VIT)


def test_a_layer_that_does_not_exist_or_has_no_positions_is_refused() -> None:
    with raises("model.unknown-layer", ModelError, where="teacher.tokens_layer", got="norm"):
        teacher(None, None, **RESNET)
    with raises("model.not-a-feature-map", ModelError, where="teacher.tokens_layer"):
        teacher("fc", None, **RESNET)
