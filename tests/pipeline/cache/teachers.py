"""Teachers with faults that a build detects, for ``python:tests.pipeline.cache.teachers:…``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

scale = 1.0
"""Changed by tests like code of a user: it is not in the state dict."""


max_rows = 1000
"""The largest batch for which ``Large`` has memory."""


class Scaled(nn.Module):
    """Pools 2x2 regions, then a linear head."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return scale * self.fc(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


class Doubled(Scaled):
    """Does not return what its linear layer does."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Cosine(Scaled):
    """Its layer takes the embedding, and its logits are cosines."""

    def forward(self, x: Tensor) -> Tensor:
        embedding = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return self.fc(embedding) / embedding.norm(dim=1, keepdim=True)


class NanOnPlainImages(Scaled):
    """Divides by the contrast of an image, which is zero for one colour."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.where(_contrast(x) < 1e-3, torch.nan, 1.0)


class NanOnNoise(Scaled):
    """Works on smooth images, so that it can be loaded, and produces NaN on rough ones."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.where(_contrast(x) > 0.9, torch.nan, 1.0)


class Large(Scaled):
    """Runs out of memory beyond ``max_rows`` rows, with the error of CUDA."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > max_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines")
        return super().forward(x)


def do_nothing() -> None: ...


during_forward: Callable[[], None] = do_nothing
"""Called by ``Disturbed`` in its forward pass, in the place of another process."""


class Disturbed(Scaled):
    """Lets a test act during the build of a part."""

    def forward(self, x: Tensor) -> Tensor:
        during_forward()
        return super().forward(x)


class HotOnWhite(Scaled):
    """Produces logits beyond fp16 on a white image, but not on noise."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        nn.init.constant_(self.fc.weight, 5000)


def _contrast(x: Tensor) -> Tensor:
    """Largest standard deviation of a channel: [B,1]."""
    return x.flatten(2).std(2).amax(1, keepdim=True)
