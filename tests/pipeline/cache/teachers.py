"""Teachers with the faults that a cache has to notice, for ``python:tests.pipeline.cache.teachers:…``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

scale = 1.0
"""What an edit of the user's code would change: it is in no state dict."""


class Scaled(nn.Module):
    """Pools 2x2 regions, then a linear head."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return scale * self.fc(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


class NanOnPlainImages(Scaled):
    """Divides by the contrast of an image, which an image of one colour has none of."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.where(_contrast(x) < 1e-3, torch.nan, 1.0)


class Loud(Scaled):
    """Logits beyond fp16's 65,504."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e5


class NanOnNoise(Scaled):
    """Runs on smooth images, so that it can be loaded, and breaks on rough ones."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.where(_contrast(x) > 0.9, torch.nan, 1.0)


def _contrast(x: Tensor) -> Tensor:
    """Largest standard deviation of a channel: [B,1]."""
    return x.flatten(2).std(2).amax(1, keepdim=True)
