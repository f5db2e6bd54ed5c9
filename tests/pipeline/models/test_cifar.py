"""The CIFAR networks have the published sizes, embeddings and parameter names, and the arithmetic of the papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, batch_norm, conv2d
from torchvision.models import MobileNetV2, ResNet, ShuffleNetV2
from torchvision.models.resnet import Bottleneck

from pipeline.core.errors import ModelError
from pipeline.models.cifar import resnet, wide_resnet
from pipeline.models.cifar_bottleneck import bottleneck_resnet
from pipeline.models.cifar_mobilenet import mobilenet_v2
from pipeline.models.cifar_shufflenet import ShuffleUnit, shufflenet_v1, shufflenet_v2
from tests.errors import raises
from tests.pipeline.models.loading import build, head_of, millions, run

K = 100
# Shortcuts of the ResNet paper have no parameters. Projections, as in the distillation tables, add less than 1 %.
PROJECTIONS = (16 * 32 + 2 * 32 + 32 * 64 + 2 * 64) / 1e6


@pytest.mark.parametrize(
    ("factory", "args", "published", "error"),
    [
        # He 2016, table 6.
        *[(resnet, (10, depth), size + PROJECTIONS, 0.006) for depth, size in ((20, 0.27), (32, 0.46), (44, 0.66))],
        (resnet, (10, 56), 0.85 + PROJECTIONS, 0.006),
        (resnet, (10, 110), 1.7 + PROJECTIONS, 0.05),
        *[(wide_resnet, (10, 40, width), size, 0.051) for width, size in ((1, 0.6), (2, 2.2), (4, 8.9))],
        (wide_resnet, (10, 16, 2), 0.7, 0.051),
        # The distillation tables.
        *[(factory, (K,), size, 0.006) for factory, size in ((bottleneck_resnet, 23.71), (mobilenet_v2, 0.81))],
        *[(factory, (K,), size, 0.006) for factory, size in ((shufflenet_v1, 0.95), (shufflenet_v2, 1.36))],
    ],
)
def test_sizes_are_the_published(
    factory: Callable[..., nn.Module], args: tuple[int, ...], published: float, error: float
) -> None:
    with torch.device("meta"):
        assert millions(factory(*args)) == pytest.approx(published, abs=error)


@pytest.mark.parametrize(
    ("factory", "kwargs", "width"),
    [
        *[("cifar:resnet", {"depth": depth}, 64) for depth in (8, 14)],
        ("cifar:resnet", {"depth": 8, "widths": [32, 64, 128, 256]}, 256),
        ("cifar:wide_resnet", {"depth": 16, "width_factor": 2}, 128),
        ("cifar:wide_resnet", {"depth": 40, "width_factor": 1}, 64),
        ("cifar:wide_resnet", {"depth": 40, "width_factor": 2}, 128),
        ("cifar_bottleneck:bottleneck_resnet", {"blocks": [1, 1, 1, 1]}, 2048),
        ("cifar_mobilenet:mobilenet_v2", {}, 1280),
        ("cifar_shufflenet:shufflenet_v1", {}, 960),
        ("cifar_shufflenet:shufflenet_v2", {}, 1024),
    ],
)
def test_the_embedding_is_the_input_of_the_head_and_has_the_published_width(
    factory: str, kwargs: dict[str, Any], width: int
) -> None:
    module = build(f"python:pipeline.models.{factory}", kwargs)
    logits_BK, embedding_BD = run(module, torch.rand(2, 3, 16, 16))
    torch.testing.assert_close(head_of(module)(embedding_BD), logits_BK)
    assert embedding_BD.shape[1] == module.embedding_dim == width
    assert embedding_BD.min() >= 0  # pooled after a ReLU


def noisy(network: nn.Module) -> Any:
    """Random values in every tensor, including statistics and biases, so that a comparison covers all of them."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            # Weights of both signs, scaled so that activations do not grow over fifty layers; variances above 0.
            scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.2
            tensor.copy_((noise - 0.5) * 3 * scale if tensor.ndim > 1 or "bias" in name else noise + 0.5)
    return network.double().eval()


def random_images(channels: int = 3, size: int = 32) -> Tensor:
    return torch.rand(2, channels, size, size, dtype=torch.float64)


def normalised(module: Any, x: Tensor) -> Tensor:
    return batch_norm(x, module.running_mean, module.running_var, module.weight, module.bias)


def test_resnet8_equals_the_arithmetic_of_the_paper() -> None:
    network, images_BCHW = noisy(resnet(10, 8)), random_images(size=12)
    x = normalised(network.bn1, conv2d(images_BCHW, network.conv1.weight, padding=1)).clamp(min=0)
    for stage, stride in ((network.layer1, 1), (network.layer2, 2), (network.layer3, 2)):
        (block,) = stage
        out = normalised(block.bn1, conv2d(x, block.conv1.weight, stride=stride, padding=1)).clamp(min=0)
        out = normalised(block.bn2, conv2d(out, block.conv2.weight, padding=1))
        if stride == 2:
            x = normalised(block.downsample[1], conv2d(x, block.downsample[0].weight, stride=2))
        x = (out + x).clamp(min=0)
    torch.testing.assert_close(network(images_BCHW), network.fc(x.mean((2, 3))))


def test_wrn_10_2_equals_the_arithmetic_of_the_paper() -> None:
    network, images_BCHW = noisy(wide_resnet(10, 10, 2)), random_images(size=12)
    x = conv2d(images_BCHW, network.conv1.weight, padding=1)
    for stage, stride in ((network.block1, 1), (network.block2, 2), (network.block3, 2)):
        (block,) = stage.layer
        active = normalised(block.bn1, x).clamp(min=0)
        out = conv2d(active, block.conv1.weight, stride=stride, padding=1)
        out = conv2d(normalised(block.bn2, out).clamp(min=0), block.conv2.weight, padding=1)
        x = out + conv2d(active, block.convShortcut.weight, stride=stride)
    x = normalised(network.bn1, x).clamp(min=0)
    torch.testing.assert_close(network(images_BCHW), network.fc(x.mean((2, 3))))


def assert_equal_logits(network: nn.Module, oracle: nn.Module) -> None:
    """``oracle`` gets the tensors of the network; both register the same ones in the same order."""
    state = dict(zip(oracle.state_dict(), network.state_dict().values(), strict=True))
    oracle.load_state_dict(state)
    images_BCHW = random_images()
    logits_BK = network(images_BCHW)
    assert logits_BK.std() > 1e-3
    torch.testing.assert_close(logits_BK, oracle.double().eval()(images_BCHW))


@pytest.mark.slow
def test_resnet50_equals_torchvisions_with_another_stem() -> None:
    oracle: Any = ResNet(Bottleneck, [3, 4, 6, 3], num_classes=K)
    oracle.conv1, oracle.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    assert_equal_logits(noisy(bottleneck_resnet(K)), oracle)


def test_shufflenet_v2_equals_torchvisions_with_another_stem() -> None:
    oracle: Any = ShuffleNetV2([4, 8, 4], [24, 116, 232, 464, 1024], num_classes=K)
    oracle.conv1[0], oracle.maxpool = nn.Conv2d(3, 24, 1, bias=False), nn.Identity()
    assert_equal_logits(noisy(shufflenet_v2(K)), oracle)


def test_mobilenet_v2_equals_torchvisions_with_relus_and_no_first_expansion() -> None:
    widths, repeats, strides = (16, 24, 32, 64, 96, 160, 320), (1, 2, 3, 4, 3, 3, 1), (1, 1, 2, 2, 1, 2, 1)
    settings = [[1 if width == 16 else 6, width, *rest] for width, *rest in zip(widths, repeats, strides, strict=True)]
    oracle: Any = MobileNetV2(K, width_mult=0.5, inverted_residual_setting=settings, round_nearest=4, dropout=0.0)
    for parent in list(oracle.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(parent, name, nn.ReLU())
    network = noisy(mobilenet_v2(K))
    expansion = network.blocks[0][0].conv[:3]
    network.blocks[0][0].conv = network.blocks[0][0].conv[3:]
    assert_equal_logits(network, oracle)
    assert [tuple(tensor.shape) for tensor in expansion.parameters()] == [(16, 16, 1, 1), (16,), (16,)]


@pytest.mark.parametrize(("in_channels", "out_channels", "stride"), [(24, 240, 2), (240, 480, 2), (240, 240, 1)])
def test_a_shufflenet_v1_unit_equals_the_arithmetic_of_the_paper(
    in_channels: int, out_channels: int, stride: int
) -> None:
    unit, x = noisy(ShuffleUnit(in_channels, out_channels, stride)), random_images(in_channels, 8)
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
    with raises(code, ModelError):
        factory(*args)
