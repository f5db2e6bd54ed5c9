"""How fast a training is, by the clock of one rank, without ever waiting for its device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pipeline.student.data.dataset import Batch


@dataclass(slots=True)
class ThroughputMeter:
    """Images and waiting since it was last read or reset.

    Steps are queued on a device and not waited for; read it where the device was waited for anyway.
    """

    clock: Callable[[], float] = time.monotonic
    _began: float = field(init=False)
    _wait_s: float = field(init=False)
    _images: int = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; counts their images, of all ranks, and the time until the loader has each."""
        while True:
            asked = self.clock()
            batch = next(batches, None)
            if batch is None:
                return
            self._wait_s += self.clock() - asked
            self._images += batch.num_rows_global
            yield batch

    def read(self) -> dict[str, float]:
        """``images_per_s`` over all ranks, and ``data_wait``: the share of this rank's time that it waited for data."""
        elapsed_s = max(self.clock() - self._began, 1e-9)
        found = {
            "images_per_s": round(self._images / elapsed_s, 2),
            "data_wait": round(min(self._wait_s / elapsed_s, 1.0), 4),
        }
        self.reset()
        return found

    def reset(self) -> None:
        """Leaves out what was done since, such as an evaluation."""
        self._began, self._wait_s, self._images = self.clock(), 0.0, 0
