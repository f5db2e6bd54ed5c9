"""A student for tests of events during a training: ``python:tests.faults.gated:Gated``."""

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
    """Slow while ``<folder>/gate`` exists, so that an event happens during the training. Each process that begins to
    train writes a line to ``<folder>/worlds``: the number of ranks and the folder of its node.
    """

    def __init__(self, num_classes: int, folder: str) -> None:
        super().__init__(num_classes)
        self.folder, self.is_reported = Path(folder), False

    def forward(self, images_BCHW: Tensor) -> Tensor:
        # A check in training mode, before the first step, computes no gradients.
        if self.training and torch.is_grad_enabled() and not self.is_reported:
            self.is_reported = True
            self._report()
        if (self.folder / "gate").exists():
            time.sleep(_PAUSE_S)
        return super().forward(images_BCHW)

    def _report(self) -> None:
        size = dist.get_world_size() if dist.is_initialized() else 1
        line = f"{size} {os.environ.get('TMPDIR')}\n"
        handle = os.open(self.folder / "worlds", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)
