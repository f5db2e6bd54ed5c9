"""Students for ``python:tests.pipeline.student.small_networks:…``: small enough to train in every test."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from stillroom import multi_head


class Small(nn.Module):
    """Two convolutions and a linear head; each row is computed alone."""

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.fc(relu(self.conv2(relu(self.conv1(images_BCHW)))).mean((2, 3)))


class Normalised(Small):
    """The same with BatchNorm, whose rows depend on each other."""

    def __init__(self, num_classes: int, width: int = 8) -> None:
        super().__init__(num_classes, width)
        self.conv1 = nn.Sequential(self.conv1, nn.BatchNorm2d(width))


@multi_head
def normalised(num_classes: int, width: int = 8) -> nn.Module:
    """``Normalised``, or its backbone with several heads."""
    return Normalised(num_classes, width)


class Undecided(Small):
    """Writes its logits by an operation that has no deterministic form."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits_BK = super().forward(images_BCHW)
        return logits_BK + logits_BK.new_zeros(1).put_(logits_BK.new_zeros(2).long(), logits_BK.new_zeros(2))


class Breaking(Small):
    """Its weights become infinite in the update after its n-th forward in training, whose loss is finite."""

    def __init__(self, num_classes: int, num_forwards: int) -> None:
        super().__init__(num_classes)
        self.num_forwards = num_forwards
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits_BK = super().forward(images_BCHW)
        if not self.training:
            return logits_BK
        self.forwards += 1
        # Adds 0, through a gradient beyond float32.
        factor = 1e38 if int(self.forwards) == self.num_forwards else 0.0
        return torch.cat([logits_BK[:, :1] + self.shift * factor * factor, logits_BK[:, 1:]], dim=1)
