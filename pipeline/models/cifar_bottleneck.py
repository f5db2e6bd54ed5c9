"""The ResNet-50 of the CIFAR distillation tables, for ``python:pipeline.models.cifar_bottleneck:bottleneck_resnet``.

It is the ImageNet network with a 3×3 stem and without pooling before the first stage. Parameter names are those of the
published checkpoints. Any input of at least 8×8 pixels works.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, relu

from pipeline.core.errors import ModelError
from pipeline.models.cifar import conv1x1, conv3x3, init_convolutions, stage
from pipeline.models.heads import multi_head

_EXPANSION = 4
_STEM, _WIDTHS = 64, (256, 512, 1024, 2048)


@multi_head
def bottleneck_resnet(num_classes: int, blocks: Sequence[int] = (3, 4, 6, 3)) -> nn.Module:
    """ResNet of bottleneck blocks in four stages (He 2016, 1512.03385, sec. 4.1); the embedding is 2048 wide.

    Args:
        blocks: number of blocks of each stage; (3, 4, 6, 3) is ResNet-50, (3, 4, 23, 3) ResNet-101.

    Raises:
        ModelError: not four stages, or a stage without blocks.
    """
    if len(blocks) != len(_WIDTHS) or min(blocks) < 1:
        raise ModelError(
            "a bottleneck ResNet has four stages",
            code="model.cifar-depth",
            got=list(blocks),
            expected="four counts, above 0",
        )
    return CifarBottleneckResNet(num_classes, tuple(blocks))


class BottleneckBlock(nn.Module):
    """1×1, 3×3, 1×1 and a shortcut, activated after the sum. [B,C,H,W] -> [B,C',H/stride,W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        width = out_channels // _EXPANSION
        self.conv1 = conv1x1(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))
        # The output of the block before its last ReLU, under a name that review_kd can use.
        self.preact = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(self.conv1(x)))
        out = relu(self.bn2(self.conv2(out)))
        return relu(self.preact(self.bn3(self.conv3(out)) + self.shortcut(x)))


class CifarBottleneckResNet(nn.Module):
    """images_BCHW -> logits_BK; the embedding is the pooled last stage, after its ReLU."""

    def __init__(self, num_classes: int, blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, _STEM)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.layer1 = stage(BottleneckBlock, _STEM, _WIDTHS[0], blocks[0], stride=1)
        self.layer2 = stage(BottleneckBlock, _WIDTHS[0], _WIDTHS[1], blocks[1], stride=2)
        self.layer3 = stage(BottleneckBlock, _WIDTHS[1], _WIDTHS[2], blocks[2], stride=2)
        self.layer4 = stage(BottleneckBlock, _WIDTHS[2], _WIDTHS[3], blocks[3], stride=2)
        self.linear = nn.Linear(_WIDTHS[3], num_classes)
        init_convolutions(self)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x = relu(self.bn1(self.conv1(images_BCHW)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(adaptive_avg_pool2d(x, 1).flatten(1))
