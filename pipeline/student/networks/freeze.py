"""Freezes parts of a student."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn

from pipeline.core.errors import ConfigError
from pipeline.student.networks.student import BATCH_NORMS

_NUM_NEAR = 3


def freeze(network: nn.Module, names: Sequence[str]) -> None:
    """Freezes modules and parameters: they get no gradients, and their BatchNorm layers use the present statistics.

    Call it in training mode, before an optimizer takes the parameters.

    Args:
        names: as in the network's ``state_dict``: ``layer1`` stands for all of ``layer1.``, ``fc.weight`` for one
            parameter.

    Raises:
        ConfigError: the network has no such name, or no parameter is left to train.
    """
    for name in names:
        _check_name(network, name)
    for name, parameter in network.named_parameters():
        if _is_covered(name, names):
            parameter.requires_grad_(False)
    for name, module in network.named_modules():
        if isinstance(module, BATCH_NORMS) and _is_covered(name, names):
            module.eval()
    if names and not any(parameter.requires_grad for parameter in network.parameters()):
        raise ConfigError(
            "every parameter is frozen, so there is nothing to train",
            code="config.all-frozen",
            where="train.freeze",
            got=", ".join(names),
            next_step="leave out a name",
        )


def _is_covered(name: str, prefixes: Sequence[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _check_name(network: nn.Module, name: str) -> None:
    valid_names = {key for key, _ in (*network.named_modules(), *network.named_parameters()) if key}
    if name in valid_names:
        return
    near = difflib.get_close_matches(name, sorted(valid_names), n=_NUM_NEAR, cutoff=0.5)
    children = [child for child, _ in network.named_children()]
    raise ConfigError(
        "the student has no module or parameter of this name",
        code="config.unknown-frozen-name",
        where="train.freeze",
        got=name,
        expected=f"one of {', '.join(near or children)}, …",
        next_step="correct the name; a module's name stands for all of its parameters",
    )
