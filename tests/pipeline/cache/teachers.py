"""Teachers with the faults that a cache has to notice, for ``python:tests.pipeline.cache.teachers:…``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

scale = 1.0
"""What an edit of the user's code would change: it is in no state dict."""


room = 1000
"""Rows that ``Large`` finds memory for."""


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


class Large(Scaled):
    """Runs out of memory, as CUDA tells it, beyond ``room`` rows."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines")
        return super().forward(x)


def do_nothing() -> None: ...


during_forward: Callable[[], None] = do_nothing
"""What ``Disturbed`` runs while it computes: the work of another process in the middle of a part."""


class Disturbed(Scaled):
    """Lets a test act while a part is built."""

    def forward(self, x: Tensor) -> Tensor:
        during_forward()
        return super().forward(x)


class HotOnWhite(Scaled):
    """A white image makes logits that fp16 has no numbers for; noise of all colours does not."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        nn.init.constant_(self.fc.weight, 5000)


def _contrast(x: Tensor) -> Tensor:
    """Largest standard deviation of a channel: [B,1]."""
    return x.flatten(2).std(2).amax(1, keepdim=True)
