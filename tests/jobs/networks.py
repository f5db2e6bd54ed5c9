"""A student that ends its process, for ``python:tests.jobs.networks:Killed``."""

from __future__ import annotations

import os

from torch import Tensor

from tests.pipeline.student.small_networks import Small


class Killed(Small):
    """Sends its process a signal in the n-th forward of a training, like a crash in native code."""

    def __init__(self, num_classes: int, number: int, forwards: int) -> None:
        super().__init__(num_classes)
        self.number, self.forwards = number, forwards

    def forward(self, images_BCHW: Tensor) -> Tensor:
        if self.training:
            self.forwards -= 1
            if not self.forwards:
                os.kill(os.getpid(), self.number)
        return super().forward(images_BCHW)
