"""Registers losses under their names in the YAML.

The parameters of a loss declare what it needs. Those in ``PARAMETERS`` (``pipeline.student.losses.inputs``) are filled
from the batch or a teacher, those in ``TaskHead.arguments`` by the head, the others are the keys of its config section.
A function may lack keys of the section: these must then have their defaults. A parameter with the default None is
optional. A loss that takes the logits or the target of a head is computed for each head of its kind; one that takes a
target averages over the rows that have it; one that takes an output of a teacher is summed over teachers; a loss whose
section has ``gather: true`` returns the value of the global batch on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from pipeline.tasks import HeadKind

LossFunction = TypeVar("LossFunction", bound=Callable[..., Tensor])

LOSSES: dict[str, Callable[..., Tensor]] = {}
"""By name, the functions for class heads, and those that take nothing of a head."""
MULTILABEL_LOSSES: dict[str, Callable[..., Tensor]] = {}
"""By name, the functions for multilabel heads."""
MAP_LOSSES: dict[str, Callable[..., Tensor]] = {}
"""By name, the functions for maps of logits."""
SAMPLED_LOSSES: set[Callable[..., Tensor]] = set()
"""Functions that are linear in the probabilities of the teacher, so that samples of these serve on average."""
BY_KIND: dict[HeadKind, dict[str, Callable[..., Tensor]]] = {
    "class": LOSSES,
    "multilabel": MULTILABEL_LOSSES,
    "map": MAP_LOSSES,
}


def register(
    name: str, *, kind: HeadKind = "class", takes_samples: bool = False
) -> Callable[[LossFunction], LossFunction]:
    """Makes a function the loss of the config sections with this ``name``; for a head of another kind the name may have
    another function. Its module is imported in ``__init__``.

    Args:
        takes_samples: the gradient is linear in the teacher's probabilities, see ``SAMPLED_LOSSES``.
    """

    def add(loss: LossFunction) -> LossFunction:
        BY_KIND[kind][name] = loss
        if takes_samples:
            SAMPLED_LOSSES.add(loss)
        return loss

    return add
