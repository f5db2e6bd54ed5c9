"""TensorBoard's event files of a run, written locally and published as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from pipeline import storage
from pipeline.core.temporary import temporary_folder

FOLDER = "tensorboard"


class TensorBoardWriter:
    """The event file of one start of a run.

    Its name has the first step, so that a start from the same checkpoint replaces it. TensorBoard reads the files of
    all starts in order and drops the steps that a later start repeats.
    """

    def __init__(self, run_url: str, *, first_step: int) -> None:
        self._url = storage.join(run_url, FOLDER, f"events.out.tfevents.{first_step:010d}")
        self._folder = temporary_folder("stillroom-board-")
        self._writer = SummaryWriter(self._folder.name, purge_step=first_step)

    def add(self, step: int, values: Mapping[str, float | int | None], *, prefix: str = "") -> None:
        """One point of each curve."""
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(prefix + name, value, step)

    def publish(self) -> None:
        self._writer.flush()
        (file,) = Path(self._folder.name).iterdir()
        storage.put(file, self._url)

    def close(self) -> None:
        self._writer.close()
        self._folder.cleanup()
