"""The small residual networks of the CIFAR distillation tables, for ``python:pipeline.models.cifar:resnet``.

Parameter names are those of the published checkpoints, so that these load. The pooling is adaptive: any input of at
least 8×8 pixels works.

| name | factory | kwargs | embedding |
|---|---|---|---|
| resnet20, 56, 110 | ``resnet`` | ``{depth: 20}`` | 64 |
| resnet8x4, resnet32x4 | ``resnet`` | ``{depth: 8, widths: [32, 64, 128, 256]}`` | 256 |
| wrn_16_2, wrn_40_1, wrn_40_2 | ``wide_resnet`` | ``{depth: 40, width_factor: 2}`` | 64 × width_factor |

The tables' other networks are in ``cifar_bottleneck`` (ResNet50), ``cifar_mobilenet`` (MobileNetV2) and
``cifar_shufflenet`` (ShuffleV1, ShuffleV2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, relu

from pipeline.core.errors import ModelError
from pipeline.models.heads import multi_head


@multi_head
def resnet(num_classes: int, depth: int, widths: Sequence[int] = (16, 16, 32, 64)) -> nn.Module:
    """ResNet of basic blocks in three stages (He 2016, 1512.03385, sec. 4.2), with projection shortcuts.

    Args:
        depth: 6n + 2 layers.
        widths: channels of the stem and of the three stages; the last is the embedding's width.

    Raises:
        ModelError: a depth that is not 6n + 2, or not four widths.
    """
    if len(widths) != 4 or min(widths) < 1:
        raise ModelError(
            "a CIFAR ResNet has four widths",
            code="model.cifar-widths",
            got=list(widths),
            expected="stem and three stages, above 0",
        )
    return CifarResNet(num_classes, _blocks_per_stage(depth, rest=2), tuple(widths))


@multi_head
def wide_resnet(num_classes: int, depth: int, width_factor: int) -> nn.Module:
    """Wide ResNet of pre-activation blocks (Zagoruyko 2016, 1605.07146), without dropout.

    Args:
        depth: 6n + 4 layers.
        width_factor: k; stages have 16k, 32k and 64k channels, and 64k is the embedding's width.

    Raises:
        ModelError: a depth that is not 6n + 4, or a factor below 1.
    """
    if width_factor < 1:
        raise ModelError("a wide ResNet's width_factor is at least 1", code="model.cifar-widths", got=width_factor)
    return CifarWideResNet(num_classes, _blocks_per_stage(depth, rest=4), width_factor)


def _blocks_per_stage(depth: int, *, rest: int) -> int:
    """Of a network of 6n + ``rest`` layers: n."""
    blocks, remainder = divmod(depth - rest, 6)
    if remainder or blocks < 1:
        raise ModelError(
            "this depth does not split into three equal stages",
            code="model.cifar-depth",
            got=depth,
            expected=f"6n + {rest}",
        )
    return blocks


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """3×3 convolution without bias; its padding preserves the size at stride 1."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, groups=groups, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """1×1 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, groups=groups, bias=False)


def stage(
    block: Callable[[int, int, int], nn.Module], in_channels: int, out_channels: int, blocks: int, *, stride: int
) -> nn.Sequential:
    """``blocks`` times ``block(in_channels, out_channels, stride)``, the first with the stride."""
    rest = [block(out_channels, out_channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(block(in_channels, out_channels, stride), *rest)


def init_convolutions(network: nn.Module) -> None:
    """Initialises convolutions by fan-out (He 2015, 1502.01852), as in the recipes of the papers."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut, activated after the sum. [B,C,H,W] -> [B,C',H/stride,W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))
        # The output of the block before its last ReLU, under a name that review_kd can use.
        self.preact = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return relu(self.preact(out + (x if self.downsample is None else self.downsample(x))))


class CifarResNet(nn.Module):
    """images_BCHW -> logits_BK; the embedding is the pooled last stage, after its ReLU."""

    def __init__(self, num_classes: int, blocks: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = stage(BasicBlock, widths[0], widths[1], blocks, stride=1)
        self.layer2 = stage(BasicBlock, widths[1], widths[2], blocks, stride=2)
        self.layer3 = stage(BasicBlock, widths[2], widths[3], blocks, stride=2)
        self.fc = nn.Linear(widths[3], num_classes)
        init_convolutions(self)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x = relu(self.bn1(self.conv1(images_BCHW)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(adaptive_avg_pool2d(x, 1).flatten(1))


class WideBlock(nn.Module):
    """Two 3×3 convolutions, each after its normalisation and ReLU. [B,C,H,W] -> [B,C',H/stride,W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.convShortcut = None
        if in_channels != out_channels:
            self.convShortcut = conv1x1(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = relu(self.bn1(x))
        out = self.conv2(relu(self.bn2(self.conv1(activated))))
        return out + (x if self.convShortcut is None else self.convShortcut(activated))


class WideStage(nn.Module):
    """A stage whose blocks are named ``layer``, as in published checkpoints."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, stride: int) -> None:
        super().__init__()
        self.layer = stage(WideBlock, in_channels, out_channels, blocks, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class CifarWideResNet(nn.Module):
    """images_BCHW -> logits_BK; the embedding is the pooled last stage, normalised and after its ReLU."""

    def __init__(self, num_classes: int, blocks: int, width_factor: int) -> None:
        super().__init__()
        widths = (16, 16 * width_factor, 32 * width_factor, 64 * width_factor)
        self.conv1 = conv3x3(3, widths[0])
        self.block1 = WideStage(widths[0], widths[1], blocks, stride=1)
        self.block2 = WideStage(widths[1], widths[2], blocks, stride=2)
        self.block3 = WideStage(widths[2], widths[3], blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)
        init_convolutions(self)
        with torch.no_grad():
            self.fc.bias.zero_()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(images_BCHW))))
        return self.fc(adaptive_avg_pool2d(relu(self.bn1(x)), 1).flatten(1))
