"""The output of a layer is a map, for every family and library, or is refused with layers that have one."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.core.errors import ModelError
from pipeline.models import EmbeddingModel, FeatureMap, find_maps, forward_with_maps, register_map_hooks
from tests.marks import slow
from tests.pipeline.models.loading import build, images

SIZE = 64
# Small networks of these families: a ViT with a class token and four registers, a Swin with one block in each stage.
TIMM_VIT: dict[str, Any] = {"img_size": SIZE, "depth": 2, "embed_dim": 24, "num_heads": 2, "reg_tokens": 4}
TIMM_SWIN: dict[str, Any] = {"img_size": SIZE, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}


_built = cache(build)


def resnet18() -> EmbeddingModel:
    """A copy, since hooks of maps stay on a network."""
    return copy.deepcopy(_built("torchvision/resnet18"))


def find(model: EmbeddingModel, *layers: str) -> tuple[FeatureMap, ...]:
    return find_maps(model, layers, size=SIZE, where="a test")


def hooked(model: EmbeddingModel, *layers: str) -> tuple[FeatureMap, ...]:
    maps = find(model, *layers)
    register_map_hooks(model.network, maps)
    return maps


@torch.no_grad()
def captured(model: EmbeddingModel, *layers: str) -> list[Tensor]:
    maps = hooked(model, *layers)
    _, outputs = forward_with_maps(maps, model, images())
    for feature_map, output in zip(maps, outputs, strict=True):
        assert output.shape == (3, feature_map.channels, feature_map.side, feature_map.side)
    return list(outputs)


@pytest.mark.parametrize(
    ("name", "kwargs", "layers", "indices"),
    [
        ("resnet18", {}, ["layer1", "layer2", "layer4"], [1, 2, 4]),
        ("vit_tiny_patch16_224", {"img_size": SIZE}, ["blocks.0", "blocks.11"], [0, 11]),
        ("vit_tiny_patch16_224", TIMM_VIT, ["blocks.0", "blocks.1"], [0, 1]),
        ("deit_tiny_distilled_patch16_224", {"img_size": SIZE}, ["blocks.2"], [2]),
        ("swin_tiny_patch4_window7_224", TIMM_SWIN, ["layers.0", "layers.2"], [0, 2]),
        ("convnext_atto", {}, ["stages.0", "stages.3"], [0, 3]),
    ],
)
def test_maps_equal_timms_forward_intermediates(
    name: str, kwargs: dict[str, Any], layers: list[str], indices: list[int]
) -> None:
    model = build(f"timm/{name}", kwargs)
    outputs = captured(model, *layers)
    network: Any = model.network
    with torch.no_grad():
        expected = network.forward_intermediates(
            images(), indices=indices, norm=False, output_fmt="NCHW", intermediates_only=True
        )
    torch.testing.assert_close(outputs, list(expected))


@pytest.mark.parametrize(
    ("name", "kwargs", "layer", "shape"),
    [
        slow("resnet18", {}, "layer3", (256, 4)),
        ("mobilenet_v3_small", {}, "features.3", (24, 8)),
        slow("vit_b_16", {"image_size": SIZE}, "encoder.layers.encoder_layer_0", (768, 4)),
        ("resnet18", {}, "avgpool", (512, 1)),
    ],
)
def test_maps_of_torchvision_have_the_sides_of_their_strides(
    name: str, kwargs: dict[str, Any], layer: str, shape: tuple[int, int]
) -> None:
    (output,) = captured(build(f"torchvision/{name}", kwargs), layer)
    assert output.shape == (3, shape[0], shape[1], shape[1])


def test_a_map_of_torchvision_equals_its_modules_run_one_by_one() -> None:
    model = resnet18()
    (output,) = captured(model, "layer1")
    network: Any = model.network
    with torch.no_grad():
        expected = network.layer1(network.maxpool(network.relu(network.bn1(network.conv1(images())))))
    torch.testing.assert_close(output, expected)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_maps_of_a_torchvision_swin_are_channels_last() -> None:
    model = build("torchvision/swin_t")
    (output,) = captured(model, "features.1")
    network: Any = model.network
    with torch.no_grad():
        torch.testing.assert_close(output, network.features[:2](images()).permute(0, 3, 1, 2))


@pytest.mark.slow
def test_tokens_of_torchvision_follow_the_class_token_row_by_row() -> None:
    model = build("torchvision/vit_b_16", {"image_size": SIZE})
    (output,) = captured(model, "encoder.dropout")
    network: Any = model.network
    with torch.no_grad():
        patches = network.conv_proj(images())
        positions = network.encoder.pos_embedding[0, 1:].T.reshape(768, 4, 4)
    torch.testing.assert_close(output, patches + positions)


def test_tokens_before_the_class_token_is_added_are_a_grid_without_prefix() -> None:
    model = build("timm/vit_tiny_patch16_224", TIMM_VIT)
    (grid,) = find(model, "patch_embed")
    (prefixed,) = find(model, "blocks.0")
    assert (grid.num_prefix_tokens, grid.side) == (0, 4)
    assert (prefixed.num_prefix_tokens, prefixed.side) == (5, 4)


@pytest.mark.parametrize("layer", ["layer1.1.bn2", "conv1", "bn1"])
def test_an_output_that_is_overwritten_later_is_captured_before(layer: str) -> None:
    """torchvision adds the shortcut and activates in place, so the output of the layer changes during the forward."""
    model = resnet18()
    (feature_map,) = find(model, layer)
    (output,) = captured(model, layer)
    seen: list[Tensor] = []
    model.network.get_submodule(layer).register_forward_hook(lambda _m, _a, output: seen.append(output.clone()))
    with torch.no_grad():
        model(images())
    assert feature_map.overwritten == (layer != "conv1")
    assert torch.equal(output, seen[0])
    assert layer == "conv1" or (output < 0).any()


def test_the_outputs_are_the_same_with_and_without_maps() -> None:
    model = resnet18()
    with torch.no_grad():
        expected = model(images())
        maps = hooked(model, "layer1.1.bn2", "layer2")
        with_two, _ = forward_with_maps(maps, model, images())
        with_none, no_maps = forward_with_maps((), model, images())
    torch.testing.assert_close(with_two, expected, rtol=0, atol=0)
    torch.testing.assert_close(with_none, expected, rtol=0, atol=0)
    assert no_maps == ()


def test_finding_maps_does_not_change_the_network() -> None:
    model = resnet18()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    find(model, "layer1", "layer2")
    refused(model, "nothing")
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def refused(model: EmbeddingModel, *layers: str) -> ModelError:
    with pytest.raises(ModelError) as caught:
        find(model, *layers)
    assert caught.value.where == "a test"
    return caught.value


def test_the_error_for_an_unknown_layer_has_near_names_and_the_last_layer_of_each_side() -> None:
    error = refused(resnet18(), "layer1", "layer5")
    assert (error.code, error.got) == ("model.unknown-layer", "layer5")
    assert "layer4" in str(error.expected)
    for suggestion in ("layer1 [64,16,16]", "layer2 [128,8,8]", "layer3 [256,4,4]", "layer4 [512,2,2]"):
        assert suggestion in str(error.next_step)


def test_the_error_for_a_name_without_near_names_has_layers_of_the_network() -> None:
    error = refused(build("timm/vit_tiny_patch16_224", TIMM_VIT), "stage7")
    assert error.code == "model.unknown-layer"
    assert "blocks.0 [24,4,4], blocks.1 [24,4,4]" in str(error.next_step)


@pytest.mark.parametrize(("layer", "got"), [("fc", r"[2, 7]"), ("pair", "tuple"), ("odd", "[2, 3, 5, 7]")])
def test_the_error_for_an_output_that_is_not_a_map_has_its_shape(layer: str, got: str) -> None:
    error = refused(_wrapped(Various()), layer)
    assert error.code == "model.not-a-feature-map"
    assert str(error.got).startswith(got)
    assert "stem [5,62,62]" in str(error.next_step)


@pytest.mark.parametrize(("layer", "times"), [("twice", 2), ("idle", 0)])
def test_a_layer_that_does_not_run_once_is_refused(layer: str, times: int) -> None:
    error = refused(_wrapped(Various()), layer)
    assert error.code == "model.layer-not-run-once"
    assert f"{layer} runs {times} times" in error.what


def test_layers_that_are_not_listed_shallow_to_deep_are_refused_with_their_order() -> None:
    error = refused(resnet18(), "layer3", "layer1", "layer2")
    assert error.code == "model.layer-order"
    assert "layer1, layer2, layer3" in str(error.expected)


def _wrapped(network: nn.Module) -> EmbeddingModel:
    return EmbeddingModel(network, (), widths={"logits": 7, "embedding": 5}).eval()


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :3, :5, :7]


class Various(nn.Module):
    """Layers whose output is a map, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.idle = nn.Conv2d(3, 5, 3), nn.Identity(), nn.Identity()
        self.pair, self.odd, self.fc = Pair(), Odd(), nn.Linear(5, 7)

    def forward_embedding(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.twice(self.twice(self.stem(x)))
        self.pair(x)
        self.odd(x)
        embedding_BD = x.mean((2, 3))
        return self.fc(embedding_BD), embedding_BD
