"""Teachers that record every batch outside of the cache, wait before a batch, or end their process at a batch."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from torch import Tensor, nn

from pipeline.models.cifar import resnet

LOG, MINE, HOLD = "STILLROOM_TEST_FORWARDS", "STILLROOM_TEST_MINE", "STILLROOM_TEST_HOLD"


class Traced(nn.Module):
    """Writes a digest of each batch of images to the file of the environment: one line, one write."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.network = resnet(num_classes=num_classes, depth=8, widths=[4, 4, 6, 8])

    def forward(self, images_BCHW: Tensor) -> Tensor:
        digest = hashlib.sha256(images_BCHW.detach().float().contiguous().numpy().tobytes()).hexdigest()
        handle = os.open(os.environ[LOG], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(handle, f"{digest}\n".encode())
        finally:
            os.close(handle)
        return self.network(images_BCHW)


def forwards() -> list[str]:
    """Digests of all batches so far, in order."""
    log = Path(os.environ[LOG])
    return log.read_text().splitlines() if log.exists() else []


class Mined(Traced):
    """Ends its process at a white image while the file of the environment exists."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        # White after normalising by 0.5 and 0.5; padding is darker.
        if bool((images_BCHW == 1).flatten(1).all(1).any()) and Path(os.environ[MINE]).exists():
            os._exit(1)
        return super().forward(images_BCHW)


class Held(Traced):
    """Waits before each batch while the file of the environment exists; ``num_waiting`` counts the first waits."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.has_waited = False

    def forward(self, images_BCHW: Tensor) -> Tensor:
        while Path(os.environ[HOLD]).exists():
            if not self.has_waited:
                self.has_waited = True
                Path(f"{os.environ[HOLD]}-{os.getpid()}").touch()
            time.sleep(0.02)
        return super().forward(images_BCHW)


def num_waiting() -> int:
    """The number of processes that have begun to wait."""
    hold = Path(os.environ[HOLD])
    return len(list(hold.parent.glob(f"{hold.name}-*")))
