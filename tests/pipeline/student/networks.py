"""Students for ``python:tests.pipeline.student.networks:…``: small enough to train in every test."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu


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


class Undecided(Small):
    """Writes its logits by an operation that has no deterministic form."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        logits_BK = super().forward(images_BCHW)
        return logits_BK + logits_BK.new_zeros(1).put_(logits_BK.new_zeros(2).long(), logits_BK.new_zeros(2))
