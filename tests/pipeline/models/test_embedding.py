"""The embedding is the head's input, in one forward, for every family and library."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from pipeline.models import EmbeddingModel, load_model
from pipeline.models.embedding import forward_with_embedding, register_head_hooks
from schemas.config import ModelConfig
from tests.tolerances import magnitude_of, network_operations, reordered, ulps

BuiltModel = Callable[[str, dict[str, Any]], EmbeddingModel]
OWN = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
FACTORIES = "python:tests.pipeline.models.factories"


def build(model: str, kwargs: dict[str, Any] | None = None) -> EmbeddingModel:
    given = {"model": model, "kwargs": kwargs or {}, **(OWN if model.startswith("python:") else {})}
    return load_model(ModelConfig.model_validate(given), num_classes=7, size=64).module


@pytest.fixture(scope="module")
def built() -> BuiltModel:
    """Builds each network once; for tests that only ask it."""
    kept: dict[str, EmbeddingModel] = {}

    def once(model: str, kwargs: dict[str, Any]) -> EmbeddingModel:
        key = f"{model} {kwargs}"
        if key not in kept:
            kept[key] = build(model, kwargs)
        return kept[key]

    return once


def images(size: int = 64, rows: int = 3) -> Tensor:
    return torch.rand(rows, 3, size, size, generator=torch.Generator().manual_seed(1))


TIMM: list[tuple[str, dict[str, Any]]] = [
    ("timm/test_resnet", {}),
    ("timm/test_efficientnet", {}),
    ("timm/test_vit", {"img_size": 64}),
    ("timm/test_convnext", {}),
    ("timm/resnet18", {}),
    ("timm/mobilenetv3_small_050", {}),
    ("timm/vit_tiny_patch16_224", {"img_size": 64}),
]
TORCHVISION: list[tuple[str, dict[str, Any]]] = [
    ("torchvision/resnet18", {}),
    ("torchvision/mobilenet_v3_small", {}),
    ("torchvision/efficientnet_b0", {}),
    ("torchvision/vit_b_16", {"image_size": 64}),
]


@pytest.mark.parametrize(("name", "kwargs"), TIMM + TORCHVISION)
def test_embedding_times_head_is_the_logits(built: BuiltModel, name: str, kwargs: dict[str, Any]) -> None:
    model = built(name, kwargs)
    with torch.no_grad():
        logits_BK, embedding_BD = model(images())
    assert logits_BK.shape == (3, model.num_classes) == (3, 7)
    assert embedding_BD.shape == (3, model.embedding_dim)
    assert model.head is not None
    weight_DK, bias_K = model.head.weight.double().T, model.head.bias.double()
    expected_BK = embedding_BD.double() @ weight_DK + bias_K
    # D products and the bias: their rounding is one of the sum of their absolute values.
    largest = (embedding_BD.double().abs() @ weight_DK.abs() + bias_K.abs()).max().item()
    torch.testing.assert_close(logits_BK.double(), expected_BK, rtol=0, atol=ulps(model.embedding_dim + 1, largest))
    # Different images, different embeddings: equality above is no accident of a dead network.
    assert not torch.allclose(embedding_BD[0], embedding_BD[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        *TIMM,
        ("timm/deit_tiny_distilled_patch16_224", {"img_size": 64}),
        ("timm/test_resnet", {"drop_rate": 0.5}),
    ],
)
def test_timm_embedding_is_timms_own_pre_logits(built: BuiltModel, name: str, kwargs: dict[str, Any]) -> None:
    model = built(name, kwargs)
    network: Any = model.network
    with torch.no_grad():
        logits_BK, embedding_BD = model(images())
        features = network.forward_features(images())
        torch.testing.assert_close(embedding_BD, network.forward_head(features, pre_logits=True))
        torch.testing.assert_close(logits_BK, network(images()))


def _resnet_by_hand(net: Any, x: Tensor) -> Tensor:
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    return net.layer4(net.layer3(net.layer2(net.layer1(x)))).mean((2, 3))


def _mobilenet_by_hand(net: Any, x: Tensor) -> Tensor:
    x = net.features(x).mean((2, 3))
    return nn.functional.hardswish(nn.functional.linear(x, net.classifier[0].weight, net.classifier[0].bias))


def _vit_by_hand(net: Any, x: Tensor) -> Tensor:
    tokens = net.conv_proj(x).flatten(2).transpose(1, 2)
    class_token = net.class_token.expand(len(x), 1, -1)
    return net.encoder(torch.cat([class_token, tokens], dim=1))[:, 0]


def _squeezenet_by_hand(net: Any, x: Tensor) -> Tensor:
    return net.features(x).mean((2, 3))


@pytest.mark.parametrize(
    ("name", "kwargs", "by_hand"),
    [
        ("resnet18", {}, _resnet_by_hand),
        ("mobilenet_v3_small", {}, _mobilenet_by_hand),
        ("vit_b_16", {"image_size": 64}, _vit_by_hand),
        ("squeezenet1_1", {}, _squeezenet_by_hand),
    ],
)
def test_torchvision_embedding_is_what_its_modules_give_by_hand(
    built: BuiltModel, name: str, kwargs: dict[str, Any], by_hand: Any
) -> None:
    model = built(f"torchvision/{name}", kwargs)
    with torch.no_grad():
        _, embedding_BD = model(images())
        expected_BD = by_hand(model.network, images())
    error = reordered(network_operations(model.network, images(), backward=False), magnitude_of(expected_BD))
    torch.testing.assert_close(embedding_BD, expected_BD, rtol=0, atol=error)


def test_a_head_that_does_not_make_the_logits_is_not_offered() -> None:
    assert build(f"{FACTORIES}:Plain").head is not None
    assert build(f"{FACTORIES}:Scaled").head is None
    assert build("torchvision/squeezenet1_1").head is None


def test_forward_embedding_of_the_network_is_believed() -> None:
    model = build(f"{FACTORIES}:SelfDescribed")
    logits_BK, embedding_BD = model(images())
    torch.testing.assert_close(embedding_BD, 2 * model.network.stem(images()).mean((2, 3)))
    torch.testing.assert_close(logits_BK, model.network(images()))
    assert model.head is None


def test_a_head_over_positions_gives_their_mean() -> None:
    model = build(f"{FACTORIES}:Tokens")
    logits_BK, embedding_BD = model(images())
    assert embedding_BD.shape == (3, 5)
    assert model.head is not None
    torch.testing.assert_close(model.head(embedding_BD), logits_BK)


def test_gradients_flow_through_logits_and_embedding_to_the_stem() -> None:
    model = build(f"{FACTORIES}:Plain")
    for answer in model.train()(images()):
        model.zero_grad()
        answer.square().sum().backward(retain_graph=True)
        gradient = model.network.stem.weight.grad
        assert gradient is not None
        assert gradient.abs().sum() > 0


def test_gradient_of_the_embedding_is_that_of_the_bare_modules() -> None:
    model = build(f"{FACTORIES}:Plain")
    stem: Any = model.network.stem
    model(images())[1].square().sum().backward()
    (expected,) = torch.autograd.grad(stem(images()).mean((2, 3)).square().sum(), [stem.weight])
    torch.testing.assert_close(stem.weight.grad, expected)


def test_no_activation_outlives_its_forward() -> None:
    model = build("timm/test_resnet")
    _, embedding_BD = model(images())
    alive = weakref.ref(embedding_BD)
    del embedding_BD, _
    gc.collect()
    assert alive() is None


def test_a_failing_forward_leaves_the_next_one_right() -> None:
    model = build(f"{FACTORIES}:Plain")
    expected = model(images())[1]
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 1, 8, 8))
    torch.testing.assert_close(model(images())[1], expected, rtol=0, atol=0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_answers_with_its_own_weights(duplicate: Any) -> None:
    model = build(f"{FACTORIES}:Plain")
    twin = duplicate(model)
    with torch.no_grad():
        twin.network.stem.weight.zero_()
        twin.network.stem.bias.fill_(2.0)
        before = model(images())
        after = twin(images())
    assert torch.equal(after[1], torch.full((3, 5), 2.0))
    assert not torch.allclose(before[1], after[1])
    torch.testing.assert_close(twin.head(after[1]), after[0])


def test_threads_that_share_a_model_get_their_own_embeddings() -> None:
    model = build("timm/test_resnet")
    batches = [images(rows=2) * scale for scale in range(1, 17)]
    with torch.no_grad():
        expected = [model(batch)[1] for batch in batches]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda batch: model(batch)[1].detach(), batches))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast_gives_the_embedding_that_made_the_logits() -> None:
    model = build("timm/test_resnet")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits_BK, embedding_BD = model(images())
        assert model.head is not None
        torch.testing.assert_close(model.head(embedding_BD), logits_BK, rtol=0, atol=0)
    assert logits_BK.dtype == torch.bfloat16


def test_state_dict_of_the_network_has_the_librarys_names() -> None:
    assert "stem.weight" in build(f"{FACTORIES}:Plain").network.state_dict()
    assert "layer1.0.conv1.weight" in build("timm/resnet18").network.state_dict()


def test_ddp_reduces_the_gradients_of_both_answers(tmp_path: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        bare = build(f"{FACTORIES}:Plain")
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(bare))
        for model in (bare, wrapped):
            logits_BK, embedding_BD = model(images())
            (logits_BK.sum() + embedding_BD.square().sum()).backward()
    finally:
        distributed.destroy_process_group()
    for ours, theirs in zip(wrapped.module.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_googlenet_trains_without_heads_that_no_loss_reads() -> None:
    model = build("torchvision/googlenet").train()
    logits_BK, embedding_BD = model(images())
    (logits_BK.sum() + embedding_BD.sum()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_heads_of_unequal_width_give_their_joined_inputs() -> None:
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
