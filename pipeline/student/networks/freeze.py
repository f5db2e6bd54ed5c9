"""Parts of a student that do not learn."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn

from pipeline.core.errors import ConfigError
from pipeline.student.networks.student import BATCH_NORMS

_NUM_NEAR = 3


def freeze(network: nn.Module, names: Sequence[str]) -> None:
    """Takes these modules and parameters out of training: no gradients, and BatchNorm with the statistics it has.

    Call it while the network is in training mode, before anything asks for its parameters.

    Args:
        names: as in the network's ``state_dict``: ``layer1`` is all of ``layer1.``, ``fc.weight`` one parameter.

    Raises:
        ConfigError: a name is none of the network's, or nothing would be left to learn.
    """
    for name in names:
        _check_name(network, name)
    for name, parameter in network.named_parameters():
        if _covered(name, names):
            parameter.requires_grad_(False)
    for name, module in network.named_modules():
        if isinstance(module, BATCH_NORMS) and _covered(name, names):
            module.eval()
    if names and not any(parameter.requires_grad for parameter in network.parameters()):
        raise ConfigError(
            "every parameter is frozen, so there is nothing to train",
            code="config.all-frozen",
            where="train.freeze",
            got=", ".join(names),
            next_step="leave out a name",
        )


def _covered(name: str, names: Sequence[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in names)


def _check_name(network: nn.Module, name: str) -> None:
    known = {one for one, _ in network.named_modules() if one} | {one for one, _ in network.named_parameters()}
    if name in known:
        return
    near = difflib.get_close_matches(name, sorted(known), n=_NUM_NEAR, cutoff=0.5)
    children = [one for one, _ in network.named_children()]
    raise ConfigError(
        "the student has no module or parameter of this name",
        code="config.unknown-frozen-name",
        where="train.freeze",
        got=name,
        expected=f"one of {', '.join(near or children)}, …",
        next_step="correct the name; a module's name stands for all that is in it",
    )
