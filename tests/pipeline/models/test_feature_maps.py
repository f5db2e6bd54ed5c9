"""A layer's output is read as a map, for every family and library, or refused with layers that serve."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.core.errors import ModelError
from pipeline.models import EmbeddingModel, FeatureMap, find_maps, forward_with_maps, load_model, register_map_hooks
from schemas.config import ModelConfig
from tests.marks import slow

OWN = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
FACTORIES = "python:tests.pipeline.models.factories"
SIZE = 64
# A ViT with a class token and four registers, a Swin of one block a stage, and so on: small, but of the family.
TIMM_VIT: dict[str, Any] = {"img_size": SIZE, "depth": 2, "embed_dim": 24, "num_heads": 2, "reg_tokens": 4}
TIMM_SWIN: dict[str, Any] = {"img_size": SIZE, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}


def build(model: str, kwargs: dict[str, Any] | None = None, size: int = SIZE) -> EmbeddingModel:
    given = {"model": model, "kwargs": kwargs or {}, **(OWN if model.startswith("python:") else {})}
    return load_model(ModelConfig.model_validate(given), num_classes=7, size=size).module


def images(size: int = SIZE, rows: int = 3) -> Tensor:
    return torch.rand(rows, 3, size, size, generator=torch.Generator().manual_seed(1))


def find(model: EmbeddingModel, *layers: str, size: int = SIZE) -> tuple[FeatureMap, ...]:
    return find_maps(model, layers, size=size, where="a test")


def observed(model: EmbeddingModel, *layers: str) -> tuple[FeatureMap, ...]:
    maps = find(model, *layers)
    register_map_hooks(model.network, maps)
    return maps


@torch.no_grad()
def maps_of(model: EmbeddingModel, *layers: str) -> list[Tensor]:
    maps = observed(model, *layers)
    _, found = forward_with_maps(maps, model, images())
    for known, one in zip(maps, found, strict=True):
        assert one.shape == (3, known.channels, known.side, known.side)
    return list(found)


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
def test_maps_are_those_that_timm_itself_reads(
    name: str, kwargs: dict[str, Any], layers: list[str], indices: list[int]
) -> None:
    model = build(f"timm/{name}", kwargs)
    found = maps_of(model, *layers)
    network: Any = model.network
    with torch.no_grad():
        expected = network.forward_intermediates(
            images(), indices=indices, norm=False, output_fmt="NCHW", intermediates_only=True
        )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("name", "kwargs", "layer", "shape"),
    [
        ("resnet18", {}, "layer3", (256, 4)),
        ("mobilenet_v3_small", {}, "features.3", (24, 8)),
        slow("swin_t", {}, "features.1", (96, 16)),
        slow("vit_b_16", {"image_size": SIZE}, "encoder.layers.encoder_layer_0", (768, 4)),
        ("resnet18", {}, "avgpool", (512, 1)),
    ],
)
def test_maps_of_torchvision_have_the_sides_of_their_strides(
    name: str, kwargs: dict[str, Any], layer: str, shape: tuple[int, int]
) -> None:
    (found,) = maps_of(build(f"torchvision/{name}", kwargs), layer)
    assert found.shape == (3, shape[0], shape[1], shape[1])


def test_a_map_of_torchvision_is_what_its_modules_give_by_hand() -> None:
    model = build("torchvision/resnet18")
    (found,) = maps_of(model, "layer1")
    network: Any = model.network
    with torch.no_grad():
        expected = network.layer1(network.maxpool(network.relu(network.bn1(network.conv1(images())))))
    torch.testing.assert_close(found, expected)


def test_a_swin_of_torchvision_is_read_channels_last() -> None:
    model = build("torchvision/swin_t")
    (found,) = maps_of(model, "features.1")
    network: Any = model.network
    with torch.no_grad():
        torch.testing.assert_close(found, network.features[:2](images()).permute(0, 3, 1, 2))


@pytest.mark.slow
def test_tokens_of_torchvision_lie_row_by_row_behind_the_class_token() -> None:
    model = build("torchvision/vit_b_16", {"image_size": SIZE})
    (found,) = maps_of(model, "encoder.dropout")
    network: Any = model.network
    with torch.no_grad():
        patches = network.conv_proj(images())
        positions = network.encoder.pos_embedding[0, 1:].T.reshape(768, 4, 4)
    torch.testing.assert_close(found, patches + positions)


def test_tokens_before_the_class_token_is_put_on_are_a_whole_grid() -> None:
    model = build("timm/vit_tiny_patch16_224", TIMM_VIT)
    (grid,) = find(model, "patch_embed")
    (behind,) = find(model, "blocks.0")
    assert (grid.num_prefix_tokens, grid.side) == (0, 4)
    assert (behind.num_prefix_tokens, behind.side) == (5, 4)


@pytest.mark.parametrize("layer", ["layer1.1.bn2", "conv1", "bn1"])
def test_an_output_that_is_overwritten_later_is_seen_as_it_was(layer: str) -> None:
    """torchvision adds the shortcut and activates in place: the layer's own output is gone after the forward."""
    model = build("torchvision/resnet18")
    (known,) = find(model, layer)
    (found,) = maps_of(model, layer)
    seen: list[Tensor] = []
    model.network.get_submodule(layer).register_forward_hook(lambda _m, _a, output: seen.append(output.clone()))
    with torch.no_grad():
        model(images())
    assert known.overwritten == (layer != "conv1")
    assert torch.equal(found, seen[0])
    assert layer == "conv1" or (found < 0).any()


def test_the_gradient_of_a_map_is_that_of_the_bare_modules() -> None:
    model = build(f"{FACTORIES}:Plain")
    maps = observed(model, "stem")
    _, (found,) = forward_with_maps(maps, model, images())
    found.square().sum().backward()
    stem: Any = model.network.stem
    (expected,) = torch.autograd.grad(stem(images()).square().sum(), [stem.weight])
    torch.testing.assert_close(stem.weight.grad, expected)


def test_the_answer_is_the_same_with_and_without_maps() -> None:
    model = build("torchvision/resnet18")
    with torch.no_grad():
        alone = model(images())
        maps = observed(model, "layer1.1.bn2", "layer2")
        beside, _ = forward_with_maps(maps, model, images())
        again, nothing = forward_with_maps((), model, images())
    for one, other in (zip(beside, alone, strict=True), zip(again, alone, strict=True)):
        assert torch.equal(*one)
        assert torch.equal(*other)
    assert nothing == ()


def test_looking_for_maps_leaves_the_network_as_it_was() -> None:
    model = build("torchvision/resnet18")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    find(model, "layer1", "layer2")
    with pytest.raises(ModelError):
        find(model, "nothing")
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_no_map_outlives_its_forward() -> None:
    model = build("timm/test_resnet")
    maps = observed(model, "layer1")
    _, (found,) = forward_with_maps(maps, model, images())
    alive = weakref.ref(found)
    del found, _
    gc.collect()
    assert alive() is None


def test_a_failing_forward_leaves_the_next_one_right() -> None:
    model = build(f"{FACTORIES}:Plain")
    maps = observed(model, "stem")
    _, (expected,) = forward_with_maps(maps, model, images())
    with pytest.raises(RuntimeError):
        forward_with_maps(maps, model, torch.zeros(1, 1, 8, 8))
    model(images(rows=1))
    _, (found,) = forward_with_maps(maps, model, images())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_shows_its_own_maps(duplicate: Any) -> None:
    model = build(f"{FACTORIES}:Plain")
    maps = observed(model, "stem")
    twin = duplicate(model)
    with torch.no_grad():
        twin.network.stem.weight.zero_()
        twin.network.stem.bias.fill_(2.0)
        _, (ours,) = forward_with_maps(maps, model, images())
        _, (theirs,) = forward_with_maps(maps, twin, images())
    assert torch.equal(theirs, torch.full_like(theirs, 2.0))
    assert not torch.equal(ours, theirs)


def test_threads_that_share_a_network_get_their_own_maps() -> None:
    model = build("timm/test_resnet")
    maps = observed(model, "layer1")
    batches = [images(rows=2) * scale for scale in range(1, 9)]

    def ask(batch: Tensor) -> Tensor:
        with torch.no_grad():
            return forward_with_maps(maps, model, batch)[1][0]

    expected = [ask(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(ask, batches), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def refusal(model: EmbeddingModel, *layers: str) -> ModelError:
    with pytest.raises(ModelError) as caught:
        find(model, *layers)
    assert caught.value.where == "a test"
    return caught.value


def test_an_unknown_layer_is_told_with_near_names_and_the_last_layer_of_each_side() -> None:
    error = refusal(build("torchvision/resnet18"), "layer1", "layer5")
    assert "no layer of this name" in error.what
    assert error.got == "layer5"
    assert "layer4" in str(error.expected)
    for named in ("layer1 [64,16,16]", "layer2 [128,8,8]", "layer3 [256,4,4]", "layer4 [512,2,2]"):
        assert named in str(error.next_step)


def test_a_name_near_none_is_told_so() -> None:
    error = refusal(build("timm/vit_tiny_patch16_224", TIMM_VIT), "stage7")
    assert "none is near" in str(error.expected)
    assert "blocks.0 [24,4,4], blocks.1 [24,4,4]" in str(error.next_step)


@pytest.mark.parametrize(("layer", "got"), [("fc", r"[2, 7]"), ("pair", "tuple"), ("odd", "[2, 3, 5, 7]")])
def test_a_layer_whose_output_is_no_map_is_told_with_its_shape(layer: str, got: str) -> None:
    error = refusal(_wrapped(Various()), layer)
    assert error.what == f"the output of {layer} is not a feature map"
    assert str(error.got).startswith(got)
    assert "stem [5,62,62]" in str(error.next_step)


@pytest.mark.parametrize(("layer", "times"), [("twice", 2), ("idle", 0)])
def test_a_layer_that_does_not_run_once_is_refused(layer: str, times: int) -> None:
    assert f"{layer} runs {times} times" in refusal(_wrapped(Various()), layer).what


def test_layers_that_are_not_listed_shallow_to_deep_are_refused_with_the_right_order() -> None:
    error = refusal(build("torchvision/resnet18"), "layer3", "layer1", "layer2")
    assert "layer1, layer2, layer3" in str(error.expected)


def _wrapped(network: nn.Module) -> EmbeddingModel:
    return EmbeddingModel(network, (), num_classes=7, embedding_dim=5, linear_head=None).eval()


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :3, :5, :7]


class Various(nn.Module):
    """Layers that serve, and layers that do not."""

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
