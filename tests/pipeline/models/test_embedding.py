"""The embedding is the input of the head, in one forward, for every family and library."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from pipeline.models import EmbeddingModel, load_model
from pipeline.models.embedding import forward_with_embedding, register_head_hooks
from schemas.config import ModelConfig
from tests.marks import slow
from tests.pipeline.models.loading import FACTORIES, NORMALISED, PLAIN, build, head_of, images, run
from tests.tolerances import magnitude_of, network_operations, reordered, ulps

CachedBuild = Callable[[str, dict[str, Any]], EmbeddingModel]


@pytest.fixture(scope="module")
def built() -> CachedBuild:
    """Builds each network once, for tests that only run its forward."""
    models: dict[str, EmbeddingModel] = {}

    def once(model: str, kwargs: dict[str, Any]) -> EmbeddingModel:
        key = f"{model} {kwargs}"
        if key not in models:
            models[key] = build(model, kwargs)
        return models[key]

    return once


TIMM: list[Any] = [
    ("timm/test_resnet", {}),
    ("timm/test_efficientnet", {}),
    ("timm/test_vit", {"img_size": 64}),
    ("timm/test_convnext", {}),
    ("timm/mobilenetv3_small_050", {}),
]
TORCHVISION: list[Any] = [
    ("torchvision/resnet18", {}),
    ("torchvision/mobilenet_v3_small", {}),
    ("torchvision/efficientnet_b0", {}),
    slow("torchvision/vit_b_16", {"image_size": 64}),
]


@pytest.mark.parametrize(("name", "kwargs"), TIMM + TORCHVISION)
def test_embedding_times_head_is_the_logits(built: CachedBuild, name: str, kwargs: dict[str, Any]) -> None:
    model = built(name, kwargs)
    with torch.no_grad():
        logits_BK, embedding_BD = run(model, images())
    assert logits_BK.shape == (3, model.widths["logits"]) == (3, 7)
    assert embedding_BD.shape == (3, model.embedding_dim) == (3, model.widths["embedding"])
    head = head_of(model)
    weight_DK, bias_K = head.weight.double().T, head.bias.double()
    expected_BK = embedding_BD.double() @ weight_DK + bias_K
    # The rounding error of D products and the bias is bounded by the sum of their absolute values.
    largest = (embedding_BD.double().abs() @ weight_DK.abs() + bias_K.abs()).max().item()
    torch.testing.assert_close(logits_BK.double(), expected_BK, rtol=0, atol=ulps(model.embedding_dim + 1, largest))
    # A dead network, with equal embeddings for all images, would pass the comparison above.
    assert not torch.allclose(embedding_BD[0], embedding_BD[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        *TIMM,
        ("timm/deit_tiny_distilled_patch16_224", {"img_size": 64}),
        ("timm/test_resnet", {"drop_rate": 0.5}),
        *[(f"timm/samvit_base_{name}", {"img_size": 64, "depth": 1}) for name in ("patch16", "patch16_224")],
        slow("timm/samvit_base_patch16_224", {"img_size": 96, "depth": 1}),
        slow("timm/caformer_s18", {}),
    ],
)
def test_the_embedding_of_a_timm_model_is_its_pre_logits(built: CachedBuild, name: str, kwargs: dict[str, Any]) -> None:
    model = built(name, kwargs)
    network: Any = model.network
    with torch.no_grad():
        pixels = images(kwargs.get("img_size", 64))
        logits_BK, embedding_BD = run(model, pixels)
        expected_BD = network.forward_head(network.forward_features(pixels), pre_logits=True)
        torch.testing.assert_close(embedding_BD, expected_BD.flatten(1))
        torch.testing.assert_close(logits_BK, network(pixels))
    assert model.embedding_dim == network.head_hidden_size


def _resnet_reference(net: Any, x: Tensor) -> Tensor:
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    return net.layer4(net.layer3(net.layer2(net.layer1(x)))).mean((2, 3))


def _mobilenet_reference(net: Any, x: Tensor) -> Tensor:
    x = net.features(x).mean((2, 3))
    return nn.functional.hardswish(nn.functional.linear(x, net.classifier[0].weight, net.classifier[0].bias))


def _vit_reference(net: Any, x: Tensor) -> Tensor:
    tokens = net.conv_proj(x).flatten(2).transpose(1, 2)
    class_token = net.class_token.expand(len(x), 1, -1)
    return net.encoder(torch.cat([class_token, tokens], dim=1))[:, 0]


def _squeezenet_reference(net: Any, x: Tensor) -> Tensor:
    return net.features(x).mean((2, 3))


@pytest.mark.parametrize(
    ("name", "kwargs", "reference"),
    [
        ("resnet18", {}, _resnet_reference),
        ("mobilenet_v3_small", {}, _mobilenet_reference),
        slow("vit_b_16", {"image_size": 64}, _vit_reference),
        ("squeezenet1_1", {}, _squeezenet_reference),
    ],
)
def test_the_embedding_of_a_torchvision_model_equals_its_modules_run_one_by_one(
    built: CachedBuild, name: str, kwargs: dict[str, Any], reference: Any
) -> None:
    model = built(f"torchvision/{name}", kwargs)
    with torch.no_grad():
        _, embedding_BD = run(model, images())
        expected_BD = reference(model.network, images())
    error = reordered(network_operations(model.network, images(), backward=False), magnitude_of(expected_BD))
    torch.testing.assert_close(embedding_BD, expected_BD, rtol=0, atol=error)


@pytest.mark.parametrize("factory", ["Plain", "SelfDescribed"])
def test_the_head_returns_an_output_of_the_name_and_width_that_a_task_requests(factory: str) -> None:
    section = ModelConfig.model_validate({"model": f"{FACTORIES}:{factory}", "weights": "random", **NORMALISED})
    model = load_model(section, widths={"x": 3}, size=64).module
    outputs = model(images())
    assert model.widths == {name: output.shape[1] for name, output in outputs.items()}
    assert (list(model.widths), model.widths["x"]) == (["x", "embedding"], 3)
    torch.testing.assert_close(outputs["x"], model.network(images()))
    torch.testing.assert_close(model.forward_heads(images())["x"], outputs["x"])


def test_forward_embedding_of_the_network_defines_the_embedding() -> None:
    model = build(f"{FACTORIES}:SelfDescribed")
    logits_BK, embedding_BD = run(model, images())
    torch.testing.assert_close(embedding_BD, 2 * model.network.stem(images()).mean((2, 3)))
    torch.testing.assert_close(logits_BK, model.network(images()))


def test_the_embedding_of_a_head_over_positions_is_their_mean() -> None:
    model = build(f"{FACTORIES}:Tokens")
    logits_BK, embedding_BD = run(model, images())
    assert embedding_BD.shape == (3, 5)
    torch.testing.assert_close(head_of(model)(embedding_BD), logits_BK)


def test_under_autocast_the_embedding_still_gives_the_logits() -> None:
    model = build("timm/test_resnet")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits_BK, embedding_BD = run(model, images())
        torch.testing.assert_close(head_of(model)(embedding_BD), logits_BK, rtol=0, atol=0)
    assert logits_BK.dtype == torch.bfloat16


def test_ddp_reduces_the_gradients_of_both_outputs(tmp_path: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        bare = build(PLAIN)
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(bare))
        for model in (bare, wrapped):
            logits_BK, embedding_BD = run(model, images())
            (logits_BK.sum() + embedding_BD.square().sum()).backward()
    finally:
        distributed.destroy_process_group()
    for reduced, expected in zip(wrapped.module.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(reduced.grad, expected.grad)


def test_every_parameter_of_googlenet_has_a_gradient() -> None:
    model = build("torchvision/googlenet").train()
    logits_BK, embedding_BD = run(model, images())
    (logits_BK.sum() + embedding_BD.sum()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_the_embedding_of_heads_of_unequal_widths_is_their_concatenated_input() -> None:
    network = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(4, 3)})
    pair = _Pair(network)
    register_head_hooks(pair, ("parts.a", "parts.b"))
    x_BD = torch.arange(12.0).reshape(2, 6)
    _, embedding_BD = forward_with_embedding(pair, ("parts.a", "parts.b"), x_BD)
    assert torch.equal(embedding_BD, x_BD)


class _Pair(nn.Module):
    def __init__(self, parts: nn.ModuleDict) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x_BD: Tensor) -> Tensor:
        return (self.parts["a"](x_BD[:, :2]) + self.parts["b"](x_BD[:, 2:])) / 2
