"""Checks that weights are finite before every checkpoint, which NaNs must not replace; and outputs in evaluations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn

from pipeline.core.errors import EvaluationError
from pipeline.student.evaluation.metrics import Outputs

_NUM_NAMED = 3


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


@dataclass(slots=True)
class FiniteRows:
    """Finds the rows of one shard whose outputs are not finite, and therefore have no rank, confidence or agreement."""

    rows: int = 0
    bad_keys: dict[str, list[str]] = field(default_factory=lambda: {"student": [], "teacher": []})
    """Sample keys by network."""

    def add(self, keys: Sequence[str], student: Outputs, teacher: Outputs | None) -> bool:
        """Returns whether all outputs so far are finite."""
        self.rows += len(keys)
        for name, outputs in (("student", student), ("teacher", teacher)):
            # Precomputed outputs of a teacher that no metric reads are empty.
            if outputs:
                is_finite = torch.stack([values.isfinite().flatten(1).all(1) for values in outputs.values()]).all(0)
                bad_rows: list[int] = (~is_finite).nonzero().flatten().tolist()
                self.bad_keys[name].extend(keys[row] for row in bad_rows)
        return not any(self.bad_keys.values())

    def check(self, *, where: str) -> None:
        """
        Raises:
            EvaluationError: there are such rows.
        """
        for name, keys in self.bad_keys.items():
            if keys:
                raise EvaluationError(
                    f"the {name}'s outputs are not finite",
                    code="evaluate.student-not-finite" if name == "student" else "evaluate.teacher-not-finite",
                    where=f"{where}, first keys {', '.join(keys[:_NUM_NAMED])}",
                    got=f"NaN or infinity in {len(keys)} of {self.rows} rows",
                    next_step="train again with a lower train.lr or with train.clip_norm, in another run.url"
                    if name == "student"
                    else "set teacher.precision=fp32, or check teacher.weights",
                )
