"""The MobileNetV2 of the CIFAR distillation tables, for ``python:pipeline.models.cifar_mobilenet:mobilenet_v2``.

It differs from the ImageNet network (Sandler 2018, 1801.04381): the second stage has stride 1, the first block has an
expansion layer of factor 1, and activations are ReLUs. Any input of at least 16×16 pixels works.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from pipeline.core.errors import ModelError
from pipeline.models.cifar import conv1x1, conv3x3, init_convolutions, stage
from pipeline.models.heads import multi_head

# Channels at width factor 1, number of blocks, stride of the first block.
_STAGES = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
_STEM, _EMBEDDING = 32, 1280


@multi_head
def mobilenet_v2(num_classes: int, width_factor: float = 0.5, expansion: int = 6) -> nn.Module:
    """MobileNetV2; the embedding is 1280 wide, or more for a width factor above 1.

    Args:
        width_factor: scales all channels; 0.5 in the tables.
        expansion: factor of the blocks after the first stage.

    Raises:
        ModelError: a factor that leaves a stage without channels, or an expansion below 1.
    """
    if int(_STAGES[0][0] * width_factor) < 1 or expansion < 1:
        raise ModelError(
            "these arguments do not define a MobileNetV2",
            code="model.cifar-widths",
            got=f"width_factor {width_factor}, expansion {expansion}",
            expected="a width_factor of at least 1/16, an expansion of at least 1",
        )
    return CifarMobileNetV2(num_classes, width_factor, expansion)


class InvertedResidual(nn.Module):
    """1×1 expansion, depthwise 3×3, 1×1 projection without activation; residual if the shapes are equal."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        expanded = in_channels * expansion
        self._is_residual = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *_activated(conv1x1(in_channels, expanded)),
            *_activated(conv3x3(expanded, expanded, stride, groups=expanded)),
            conv1x1(expanded, out_channels),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self._is_residual else self.conv(x)


class CifarMobileNetV2(nn.Module):
    """images_BCHW -> logits_BK; the embedding is the pooled last convolution, after its ReLU."""

    def __init__(self, num_classes: int, width_factor: float, expansion: int) -> None:
        super().__init__()
        channels = int(_STEM * width_factor)
        self.conv1 = nn.Sequential(*_activated(conv3x3(3, channels, stride=2)))
        self.blocks = nn.Sequential()
        for number, (width, blocks, stride) in enumerate(_STAGES):
            out_channels = int(width * width_factor)
            block = partial(InvertedResidual, expansion=expansion if number else 1)
            self.blocks.append(stage(block, channels, out_channels, blocks, stride=stride))
            channels = out_channels
        width = int(_EMBEDDING * max(1.0, width_factor))
        self.conv2 = nn.Sequential(*_activated(conv1x1(channels, width)))
        head = nn.Linear(width, num_classes)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        self.classifier = nn.Sequential(head)
        init_convolutions(self)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x = self.conv2(self.blocks(self.conv1(images_BCHW)))
        return self.classifier(adaptive_avg_pool2d(x, 1).flatten(1))


def _activated(convolution: nn.Conv2d) -> tuple[nn.Module, ...]:
    return convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU(inplace=True)
