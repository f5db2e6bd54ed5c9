"""The larger and the mobile networks of the CIFAR tables: published sizes, and the arithmetic of torchvision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, batch_norm, conv2d
from torchvision.models import MobileNetV2, ResNet, ShuffleNetV2
from torchvision.models.resnet import Bottleneck

from pipeline.models.cifar_bottleneck import bottleneck_resnet
from pipeline.models.cifar_mobilenet import mobilenet_v2
from pipeline.models.cifar_shufflenet import ShuffleUnit, shufflenet_v1, shufflenet_v2
from tests.pipeline.models.loading import build, millions

K = 100


@pytest.mark.parametrize(
    ("factory", "published"),
    [(bottleneck_resnet, 23.71), (mobilenet_v2, 0.81), (shufflenet_v1, 0.95), (shufflenet_v2, 1.36)],
)
def test_sizes_are_those_of_the_distillation_tables(factory: Callable[[int], nn.Module], published: float) -> None:
    assert millions(factory(K)) == pytest.approx(published, abs=0.006)


@pytest.mark.parametrize(
    ("factory", "width"),
    [
        ("cifar_bottleneck:bottleneck_resnet", 2048),
        ("cifar_mobilenet:mobilenet_v2", 1280),
        ("cifar_shufflenet:shufflenet_v1", 960),
        ("cifar_shufflenet:shufflenet_v2", 1024),
    ],
)
def test_the_embedding_is_the_input_of_the_head(factory: str, width: int) -> None:
    module = build(f"python:pipeline.models.{factory}")
    logits_BK, embedding_BD = module(torch.rand(2, 3, 32, 32))
    assert module.head is not None
    torch.testing.assert_close(module.head(embedding_BD), logits_BK)
    assert (embedding_BD.shape[1], bool((embedding_BD >= 0).all())) == (width, True)  # pooled after a ReLU


def noisy(network: nn.Module) -> nn.Module:
    """Random values in every tensor, including statistics and biases, so that the comparison covers all of them."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            # Weights of both signs, scaled so that activations do not grow over fifty layers; variances above 0.
            scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.2
            tensor.copy_((noise - 0.5) * 3 * scale if tensor.ndim > 1 or "bias" in name else noise + 0.5)
    return network.double().eval()


def copy_in_order(source: nn.Module, target: nn.Module) -> None:
    """Copies tensors of one network into another that registers the same ones in the same order."""
    values, names = list(source.state_dict().values()), list(target.state_dict())
    assert len(values) == len(names)
    target.load_state_dict(dict(zip(names, values, strict=True)))


def assert_equal_logits(network: nn.Module, oracle: nn.Module) -> None:
    images_BCHW = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    logits_BK = network(images_BCHW)
    assert logits_BK.std() > 1e-3
    torch.testing.assert_close(logits_BK, oracle.double().eval()(images_BCHW))


@pytest.mark.slow
def test_resnet50_equals_torchvisions_with_another_stem() -> None:
    network = noisy(bottleneck_resnet(K))
    oracle: Any = ResNet(Bottleneck, [3, 4, 6, 3], num_classes=K)
    oracle.conv1, oracle.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    copy_in_order(network, oracle)
    assert_equal_logits(network, oracle)


def test_shufflenet_v2_equals_torchvisions_with_another_stem() -> None:
    network = noisy(shufflenet_v2(K))
    oracle: Any = ShuffleNetV2([4, 8, 4], [24, 116, 232, 464, 1024], num_classes=K)
    oracle.conv1[0], oracle.maxpool = nn.Conv2d(3, 24, 1, bias=False), nn.Identity()
    copy_in_order(network, oracle)
    assert_equal_logits(network, oracle)


def test_mobilenet_v2_equals_torchvisions_with_relus_and_no_first_expansion() -> None:
    network: Any = noisy(mobilenet_v2(K))
    settings = [
        [1, 16, 1, 1],
        [6, 24, 2, 1],
        [6, 32, 3, 2],
        [6, 64, 4, 2],
        [6, 96, 3, 1],
        [6, 160, 3, 2],
        [6, 320, 1, 1],
    ]
    oracle: Any = MobileNetV2(K, width_mult=0.5, inverted_residual_setting=settings, round_nearest=4, dropout=0.0)
    with_plain_relus(oracle)
    expansion = network.blocks[0][0].conv[:3]
    network.blocks[0][0].conv = network.blocks[0][0].conv[3:]
    copy_in_order(network, oracle)
    assert_equal_logits(network, oracle)
    assert [tuple(tensor.shape) for tensor in expansion.parameters()] == [(16, 16, 1, 1), (16,), (16,)]


def with_plain_relus(network: nn.Module) -> None:
    for name, child in network.named_children():
        if isinstance(child, nn.ReLU6):
            setattr(network, name, nn.ReLU())
        else:
            with_plain_relus(child)


def normalised(module: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return batch_norm(x, module.running_mean, module.running_var, module.weight, module.bias)


@pytest.mark.parametrize(("in_channels", "out_channels", "stride"), [(24, 240, 2), (240, 480, 2), (240, 240, 1)])
def test_a_shufflenet_v1_unit_equals_the_arithmetic_of_the_paper(
    in_channels: int, out_channels: int, stride: int
) -> None:
    unit: Any = noisy(ShuffleUnit(in_channels, out_channels, stride))
    x = torch.rand(2, in_channels, 8, 8, dtype=torch.float64)
    groups = 1 if in_channels == 24 else 3
    out = normalised(unit.bn1, conv2d(x, unit.conv1.weight, groups=groups)).clamp(min=0)
    middle = out.shape[1]
    # Output channels cycle through the groups.
    shuffled = [(j % groups) * (middle // groups) + j // groups for j in range(middle)]
    out = conv2d(out[:, shuffled], unit.conv2.weight, stride=stride, padding=1, groups=middle)
    out = normalised(unit.bn3, conv2d(normalised(unit.bn2, out).clamp(min=0), unit.conv3.weight, groups=3))
    expected = out + x if stride == 1 else torch.cat([out, avg_pool2d(x, 3, 2, 1)], 1)
    torch.testing.assert_close(unit(x), expected.clamp(min=0))
    assert expected.shape[1] == out_channels


def test_shufflenet_v1_has_the_stages_of_the_paper() -> None:
    network: Any = shufflenet_v1(K)
    assert [len(stage) for stage in (network.layer1, network.layer2, network.layer3)] == [4, 8, 4]
    x = torch.rand(2, 3, 32, 32)
    shapes = []
    for stage in (network.conv1, network.layer1, network.layer2, network.layer3):
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(24, 32, 32), (240, 16, 16), (480, 8, 8), (960, 4, 4)]
