"""A student for tests of what happens during a training: ``python:tests.faults.gated:Gated``."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tests.pipeline.student.small_networks import Small

_PAUSE_S = 1.0


class Gated(Small):
    """Slow as long as ``<folder>/gate`` exists, so that what is to happen during a training happens during it. Each
    process that begins to learn leaves a line in ``<folder>/worlds``: the number of ranks and its node's folder."""

    def __init__(self, num_classes: int, folder: str) -> None:
        super().__init__(num_classes)
        self.folder, self.is_known = Path(folder), False

    def forward(self, images_BCHW: Tensor) -> Tensor:
        # A check in training mode, before the first step, computes no gradients.
        if self.training and torch.is_grad_enabled() and not self.is_known:
            self.is_known = True
            self._emit()
        if (self.folder / "gate").exists():
            time.sleep(_PAUSE_S)
        return super().forward(images_BCHW)

    def _emit(self) -> None:
        size = dist.get_world_size() if dist.is_initialized() else 1
        line = f"{size} {os.environ.get('TMPDIR')}\n"
        handle = os.open(self.folder / "worlds", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)
