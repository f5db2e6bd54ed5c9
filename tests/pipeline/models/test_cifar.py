"""The CIFAR networks have the published sizes, embeddings and parameter names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d

from pipeline.core.errors import ModelError
from pipeline.models.cifar import resnet, wide_resnet
from pipeline.models.cifar_bottleneck import bottleneck_resnet
from pipeline.models.cifar_mobilenet import mobilenet_v2
from tests.pipeline.models.loading import build, millions

X4 = (32, 64, 128, 256)


@pytest.mark.parametrize(("depth", "published"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_resnet_sizes_are_those_of_he_2016(depth: int, published: float) -> None:
    # Shortcuts of the paper have no parameters. Projections, as in the distillation tables, add less than 1 %.
    plain = millions(resnet(10, depth)) - (16 * 32 + 2 * 32 + 32 * 64 + 2 * 64) / 1e6
    assert plain == pytest.approx(published, abs=0.05 if published == 1.7 else 0.006)


@pytest.mark.parametrize(
    ("network", "published"),
    [
        (wide_resnet(10, 40, 1), 0.6),
        (wide_resnet(10, 40, 2), 2.2),
        (wide_resnet(10, 16, 2), 0.7),
        (wide_resnet(10, 40, 4), 8.9),
    ],
)
def test_wide_resnet_sizes_are_the_published(network: nn.Module, published: float) -> None:
    assert millions(network) == pytest.approx(published, abs=0.051)


@pytest.mark.parametrize(
    ("factory", "kwargs", "width"),
    [
        ("resnet", {"depth": 8}, 64),
        ("resnet", {"depth": 14}, 64),
        ("resnet", {"depth": 56}, 64),
        ("resnet", {"depth": 8, "widths": list(X4)}, 256),
        ("resnet", {"depth": 32, "widths": list(X4)}, 256),
        ("wide_resnet", {"depth": 16, "width_factor": 2}, 128),
        ("wide_resnet", {"depth": 40, "width_factor": 1}, 64),
        ("wide_resnet", {"depth": 40, "width_factor": 2}, 128),
    ],
)
def test_embeddings_have_the_width_of_the_published_class_means(
    factory: str, kwargs: dict[str, Any], width: int
) -> None:
    module = build(f"python:pipeline.models.cifar:{factory}", kwargs)
    assert module.embedding_dim == width
    logits_BK, embedding_BD = module(torch.rand(2, 3, 16, 16))
    assert module.head is not None
    torch.testing.assert_close(module.head(embedding_BD), logits_BK)
    assert embedding_BD.min() >= 0  # pooled after a ReLU


def _norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return batch_norm(
        x, state[f"{name}.running_mean"], state[f"{name}.running_var"], state[f"{name}.weight"], state[f"{name}.bias"]
    )


def _noisy(network: nn.Module) -> dict[str, Tensor]:
    """Random values in every tensor, including statistics and biases, so that the comparison covers all of them."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.1
        for name, tensor in network.state_dict().items()
        if tensor.is_floating_point()
    }
    state = {name: t - 0.6 if name.endswith(("conv1.weight", "conv2.weight")) else t for name, t in state.items()}
    network.load_state_dict(state, strict=False)
    return state


def test_resnet8_equals_the_arithmetic_of_the_paper() -> None:
    network = resnet(10, 8).double().eval()
    s = _noisy(network)
    images_BCHW = torch.rand(2, 3, 12, 12, dtype=torch.float64)
    x = _norm(s, "bn1", conv2d(images_BCHW, s["conv1.weight"], padding=1)).clamp(min=0)
    for layer, stride in (("layer1.0", 1), ("layer2.0", 2), ("layer3.0", 2)):
        out = _norm(s, f"{layer}.bn1", conv2d(x, s[f"{layer}.conv1.weight"], stride=stride, padding=1)).clamp(min=0)
        out = _norm(s, f"{layer}.bn2", conv2d(out, s[f"{layer}.conv2.weight"], padding=1))
        if stride == 2:
            x = _norm(s, f"{layer}.downsample.1", conv2d(x, s[f"{layer}.downsample.0.weight"], stride=2))
        x = (out + x).clamp(min=0)
    torch.testing.assert_close(network(images_BCHW), x.mean((2, 3)) @ s["fc.weight"].T + s["fc.bias"])


def test_wrn_10_2_equals_the_arithmetic_of_the_paper() -> None:
    network = wide_resnet(10, 10, 2).double().eval()
    s = _noisy(network)
    images_BCHW = torch.rand(2, 3, 12, 12, dtype=torch.float64)
    x = conv2d(images_BCHW, s["conv1.weight"], padding=1)
    for block, stride in (("block1.layer.0", 1), ("block2.layer.0", 2), ("block3.layer.0", 2)):
        active = _norm(s, f"{block}.bn1", x).clamp(min=0)
        out = conv2d(active, s[f"{block}.conv1.weight"], stride=stride, padding=1)
        out = conv2d(_norm(s, f"{block}.bn2", out).clamp(min=0), s[f"{block}.conv2.weight"], padding=1)
        x = out + conv2d(active, s[f"{block}.convShortcut.weight"], stride=stride)
    x = _norm(s, "bn1", x).clamp(min=0)
    torch.testing.assert_close(network(images_BCHW), x.mean((2, 3)) @ s["fc.weight"].T + s["fc.bias"])


@pytest.mark.parametrize(
    ("factory", "args", "code"),
    [
        (resnet, (10, 21), "model.cifar-depth"),
        (resnet, (10, 2), "model.cifar-depth"),
        (wide_resnet, (10, 20, 2), "model.cifar-depth"),
        (resnet, (10, 8, (16, 32, 64)), "model.cifar-widths"),
        (wide_resnet, (10, 16, 0), "model.cifar-widths"),
        (bottleneck_resnet, (10, (3, 4, 6)), "model.cifar-depth"),
        (bottleneck_resnet, (10, (3, 0, 6, 3)), "model.cifar-depth"),
        (mobilenet_v2, (10, 0.05), "model.cifar-widths"),
        (mobilenet_v2, (10, 0.5, 0), "model.cifar-widths"),
    ],
)
def test_arguments_that_do_not_define_a_network_are_refused(
    factory: Callable[..., nn.Module], args: tuple[Any, ...], code: str
) -> None:
    with pytest.raises(ModelError) as caught:
        factory(*args)
    assert caught.value.code == code
