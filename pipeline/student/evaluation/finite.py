"""Checks that weights are finite, before every checkpoint: NaNs must not replace a good checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class FiniteWeights:
    """All parameters of some modules, and the buffers that were finite at first: a mask may contain -inf on purpose."""

    modules: tuple[nn.Module, ...]
    exempt: frozenset[str]

    @classmethod
    def of(cls, modules: Iterable[nn.Module]) -> FiniteWeights:
        modules = tuple(modules)
        return cls(modules, frozenset(name for name, value in _buffers(modules) if not value.isfinite().all()))

    def not_finite(self) -> list[str]:
        """Names of the tensors with NaN or infinity. Waits for the device once."""
        values = {
            name: value
            for name, value in chain(_parameters(self.modules), _buffers(self.modules))
            if name not in self.exempt
        }
        if not values:
            return []
        is_finite = torch.stack([value.isfinite().all() for value in values.values()]).tolist()
        return [name for name, finite in zip(values, is_finite, strict=True) if not finite]


def _parameters(modules: Iterable[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for number, module in enumerate(modules):
        yield from module.named_parameters(prefix=_prefix(number))


def _buffers(modules: Iterable[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for number, module in enumerate(modules):
        for name, value in module.named_buffers(prefix=_prefix(number)):
            if value.is_floating_point():
                yield name, value


def _prefix(number: int) -> str:
    """The averaged weights have the names of the trained ones."""
    return "averaged" if number else ""
