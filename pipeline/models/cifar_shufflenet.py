"""The ShuffleNets of the CIFAR distillation tables, for ``python:pipeline.models.cifar_shufflenet:shufflenet_v1``
and ``:shufflenet_v2``.

Unlike in the ImageNet networks the stem is one 1×1 convolution without pooling. Any input of at least 8×8 pixels works.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, relu

from pipeline.models.cifar import conv1x1, conv3x3, stage
from pipeline.models.heads import multi_head

_STEM = 24
_V1_WIDTHS, _V1_BLOCKS, _V1_GROUPS = (240, 480, 960), (4, 8, 4), 3
_V2_WIDTHS, _V2_BLOCKS, _V2_EMBEDDING = (116, 232, 464), (4, 8, 4), 1024


@multi_head
def shufflenet_v1(num_classes: int) -> nn.Module:
    """ShuffleNet of 3 groups (Zhang 2018, 1707.01083); the embedding is 960 wide."""
    return CifarShuffleNetV1(num_classes)


@multi_head
def shufflenet_v2(num_classes: int) -> nn.Module:
    """ShuffleNetV2 of width 1 (Ma 2018, 1807.11164); the embedding is 1024 wide."""
    return CifarShuffleNetV2(num_classes)


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel shuffle: channel j·g + i of the result is channel j of group i. [B,C,H,W] -> [B,C,H,W]."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleUnit(nn.Module):
    """Grouped 1×1, shuffle, depthwise 3×3, grouped 1×1. [B,C,H,W] -> [B,C',H/stride,W/stride].

    With stride 1 the input is added. With stride 2 the pooled input is concatenated, as ``in_channels`` of the
    ``out_channels``.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        branch = out_channels - in_channels if stride == 2 else out_channels
        middle = branch // 4
        # The stem has too few channels for groups (Zhang 2018, sec. 3.2).
        self._groups = 1 if in_channels == _STEM else _V1_GROUPS
        self._stride = stride
        self.conv1 = conv1x1(in_channels, middle, groups=self._groups)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = conv3x3(middle, middle, stride, groups=middle)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = conv1x1(middle, branch, groups=_V1_GROUPS)
        self.bn3 = nn.BatchNorm2d(branch)

    def forward(self, x: Tensor) -> Tensor:
        out = shuffle(relu(self.bn1(self.conv1(x))), self._groups)
        # The networks of the tables have this ReLU, the unit of the paper does not.
        out = relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self._stride == 1:
            return relu(out + x)
        return relu(torch.cat([out, avg_pool2d(x, 3, stride=2, padding=1)], dim=1))


class CifarShuffleNetV1(nn.Module):
    """images_BCHW -> logits_BK; the embedding is the pooled last stage, after its ReLU."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = conv1x1(3, _STEM)
        self.bn1 = nn.BatchNorm2d(_STEM)
        first, second, third = _V1_WIDTHS
        self.layer1 = stage(ShuffleUnit, _STEM, first, _V1_BLOCKS[0], stride=2)
        self.layer2 = stage(ShuffleUnit, first, second, _V1_BLOCKS[1], stride=2)
        self.layer3 = stage(ShuffleUnit, second, third, _V1_BLOCKS[2], stride=2)
        self.linear = nn.Linear(third, num_classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x = relu(self.bn1(self.conv1(images_BCHW)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(adaptive_avg_pool2d(x, 1).flatten(1))


class SplitUnit(nn.Module):
    """Identity for half of the channels, 1×1, depthwise 3×3, 1×1 for the other half; then a shuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = conv1x1(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = conv3x3(half, half, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(half, half)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        identity, branch = x.chunk(2, dim=1)
        out = relu(self.bn1(self.conv1(branch)))
        out = relu(self.bn3(self.conv3(self.bn2(self.conv2(out)))))
        return shuffle(torch.cat([identity, out], dim=1), 2)


class DownUnit(nn.Module):
    """Two branches over all channels at half the resolution, then a shuffle. [B,C,H,W] -> [B,C',H/2,W/2]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1 = conv3x3(in_channels, in_channels, stride=2, groups=in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = conv1x1(in_channels, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(in_channels, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = conv3x3(half, half, stride=2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv1x1(half, half)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = relu(self.bn3(self.conv3(x)))
        right = relu(self.bn5(self.conv5(self.bn4(self.conv4(right)))))
        return shuffle(torch.cat([left, right], dim=1), 2)


class CifarShuffleNetV2(nn.Module):
    """images_BCHW -> logits_BK; the embedding is the pooled last convolution, after its ReLU."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = conv1x1(3, _STEM)
        self.bn1 = nn.BatchNorm2d(_STEM)
        first, second, third = _V2_WIDTHS
        self.layer1 = _stage_v2(_STEM, first, _V2_BLOCKS[0])
        self.layer2 = _stage_v2(first, second, _V2_BLOCKS[1])
        self.layer3 = _stage_v2(second, third, _V2_BLOCKS[2])
        self.conv2 = conv1x1(third, _V2_EMBEDDING)
        self.bn2 = nn.BatchNorm2d(_V2_EMBEDDING)
        self.linear = nn.Linear(_V2_EMBEDDING, num_classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x = relu(self.bn1(self.conv1(images_BCHW)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = relu(self.bn2(self.conv2(x)))
        return self.linear(adaptive_avg_pool2d(x, 1).flatten(1))


def _stage_v2(in_channels: int, out_channels: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(DownUnit(in_channels, out_channels), *(SplitUnit(out_channels) for _ in range(blocks - 1)))
