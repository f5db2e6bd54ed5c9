"""Registers losses under their names in the YAML.

The parameters of a loss declare what it needs. Those in ``PARAMETERS`` (``pipeline.student.losses.inputs``) are filled
from the batch or a teacher, the others are the keys of its config section. A parameter with the default None is
optional. A loss that takes a target averages over the rows that have it; a loss that takes an output of a teacher is
summed over teachers; a loss whose section has ``gather: true`` returns the value of the global batch on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

LossFunction = TypeVar("LossFunction", bound=Callable[..., Tensor])

LOSSES: dict[str, Callable[..., Tensor]] = {}
LOSS_TASKS: dict[str, tuple[str, ...]] = {}
"""By the name of a loss, the tasks (``data.task``) whose targets and outputs it takes."""


def register(name: str, *, tasks: tuple[str, ...] = ("classification",)) -> Callable[[LossFunction], LossFunction]:
    """Makes a function the loss of the config sections with this ``name``. Its module is imported in ``__init__``."""

    def add(loss: LossFunction) -> LossFunction:
        LOSSES[name], LOSS_TASKS[name] = loss, tasks
        return loss

    return add
