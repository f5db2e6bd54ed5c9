"""The loss section of a config as one function: weights, warm-up, and factors that make DDP's mean exact."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.core.errors import ConfigError, TrainingError
from pipeline.student.data.teacher_outputs import TeacherOutputs
from pipeline.student.losses.arithmetic import is_labelled
from pipeline.student.losses.dist import SumOverRanks
from pipeline.student.losses.nd import ClassDirections
from pipeline.student.losses.registry import LOSSES
from schemas.config import LossConfig, LossSection

_TEACHER_INPUTS = frozenset(
    {"teacher_BK", "teacher_norm_B", "teacher_BD", "student_BD", "class_directions", "student_maps", "teacher_maps"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherInputs:
    """What losses may take of one teacher for one batch, on the batch's device."""

    outputs: TeacherOutputs
    projected: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """The student's embedding in this teacher's width, by the key of the term."""
    class_directions: ClassDirections | None = None
    student_maps: tuple[Tensor, ...] | None = None
    """[B,C,H,W] for each level, fused into the shapes of ``teacher_maps``."""
    teacher_maps: tuple[Tensor, ...] | None = None

    def at(self, key: str, temperature: float) -> dict[str, Any]:
        """The inputs of one term by parameter name, with logits decoded for its temperature."""
        return {
            "teacher_BK": self.outputs.logits_at(temperature),
            "teacher_norm_B": self.outputs.norm_B,
            "teacher_BD": self.outputs.embedding_BD,
            "student_BD": self.projected.get(key),
            "class_directions": self.class_directions,
            "student_maps": self.student_maps,
            "teacher_maps": self.teacher_maps,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """What losses may take of one batch on one rank, all on one device. B is the rank's number of rows."""

    student_BK: Tensor  # logits
    labels_B: Tensor  # int64, -1: none
    embedding_BD: Tensor | None = None  # the student's, in its width
    teachers: tuple[TeacherInputs, ...] = ()
    partner_B: Tensor | None = None  # int64, position of each row's mixup partner in this batch; None: not mixed
    lambda_B: Tensor | None = None  # share of the row's image in its mixed pixels; comes with partner_B
    sum_over_ranks: SumOverRanks | None = None  # for terms that gather

    @property
    def mixed_labels_B(self) -> Tensor | None:
        """int64 ``[B]``, the partners' labels; None: the batch is not mixed."""
        return None if self.partner_B is None else self.labels_B[self.partner_B]

    @property
    def num_labelled(self) -> Tensor:
        """0-d int64 on the batch's device: rows over which losses with labels average. Callers sum it over ranks."""
        return is_labelled(self.labels_B, self.mixed_labels_B).sum()


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShare:
    """This rank's part of the global batch of one step.

    DDP averages the ranks' gradients. A term that is a mean over ``num`` of ``num_global`` valid rows is therefore
    multiplied by ``num · W / num_global``, so that the mean over ranks is the mean over the global batch. Tensors are
    0-d and on the batch's device, so that no step waits for a count.
    """

    world_size: int
    num_rows: int | Tensor
    num_rows_global: int | Tensor
    num_labelled: int | Tensor
    num_labelled_global: int | Tensor

    @property
    def row_factor(self) -> float | Tensor:
        """Factor of a term that averages over all rows; 0 if no rank has any."""
        return self._factor(self.num_rows, self.num_rows_global)

    @property
    def labelled_factor(self) -> float | Tensor:
        """Factor of a term that averages over the labelled rows; 0 if no rank has any."""
        return self._factor(self.num_labelled, self.num_labelled_global)

    def _factor(self, num: int | Tensor, num_global: int | Tensor) -> float | Tensor:
        divisor = num_global.clamp_min(1) if isinstance(num_global, Tensor) else max(num_global, 1)
        return num * self.world_size / divisor


@dataclass(frozen=True, slots=True)
class _Term:
    """One entry of the loss section, with its function."""

    key: str
    section: LossSection
    loss: Callable[..., Tensor]
    required: frozenset[str]
    optional: frozenset[str]
    options: dict[str, Any]

    def factor(self, share: BatchShare) -> float | Tensor:
        """The factor that makes DDP's mean over ranks the mean over the global batch."""
        if "sum_over_ranks" in self.required:
            return 1.0
        return share.labelled_factor if "labels_B" in self.required else share.row_factor

    def weight(self, epoch: int) -> float:
        """The weight in a 0-based epoch. Warm-up starts at 0 for the whole first epoch (Wang 2023)."""
        warmup_epochs = self.section.warmup_epochs
        return self.section.weight * (min(1.0, epoch / warmup_epochs) if warmup_epochs else 1.0)

    @property
    def temperature(self) -> float:
        """At which this term takes the teacher's logits; 1 for a loss without temperature."""
        return self.options.get("temperature", 1.0)

    def values(self, inputs: LossInputs) -> list[Tensor]:
        """One value for each teacher if the loss takes an input of the teacher, else one value."""
        teachers = inputs.teachers if self.required & _TEACHER_INPUTS else ()
        by_teacher = [teacher.at(self.key, self.temperature) for teacher in teachers]
        return [self._value(inputs, teacher_inputs) for teacher_inputs in by_teacher or [{}]]

    def _value(self, inputs: LossInputs, teacher_inputs: Mapping[str, Any]) -> Tensor:
        tensors = {
            name: teacher_inputs.get(name) if name in _TEACHER_INPUTS else getattr(inputs, name)
            for name in self.required | self.optional
        }
        missing = sorted(name for name in self.required if tensors[name] is None)
        if missing:
            raise TrainingError(
                f"the loss {self.key} lacks inputs",
                code="loss.missing-input",
                where="LossInputs of one batch",
                got=f"None for {', '.join(missing)}",
                expected=", ".join(sorted(self.required)),
                next_step="fill them; the needs_… properties of CompositeLoss list what the terms take",
            )
        return self.loss(**tensors, **self.options)


class CompositeLoss:
    """The weighted sum of the terms of a config's loss section.

    Args:
        terms: the ``loss`` section, in its order. The same loss may occur several times, for example at two
            temperatures.
        where: the config, for messages.

    Raises:
        ConfigError: the section is empty.
    """

    def __init__(self, terms: Sequence[LossConfig], *, where: str) -> None:
        if not terms:
            raise ConfigError(
                "the loss section is missing",
                code="config.no-loss",
                where=where,
                expected=f"one or more of {', '.join(sorted(LOSSES))}",
                next_step="add a section such as  loss: [{name: kd, weight: 1.0, temperature: 4.0}]",
            )
        self._terms = [_term(key, section) for key, section in zip(_keys(terms), terms, strict=True)]

    def __call__(self, inputs: LossInputs, share: BatchShare, *, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the total loss and the value of each term.

        Args:
            inputs: this rank's batch.
            share: this rank's part of the global batch.
            epoch: 0-based, for warm-up.

        Returns:
            The total, an fp32 scalar, weighted and scaled for DDP's mean over ranks, on which to call ``backward``; and
            by term (``kd``, ``kd_2``, …) the fp32 mean over this rank's valid rows, unweighted, unscaled and detached.
            With several teachers a term is summed over them (FunMatch, Beyer 2022), and ``kd/0``, ``kd/1``, … are the
            values of the individual teachers.

        Raises:
            TrainingError: the batch lacks an input of a term.
        """
        # A 0 that depends on the logits: if no term reads them, DDP would wait for the gradient of the head.
        total = inputs.student_BK[:0].float().sum()
        values: dict[str, Tensor] = {}
        for term in self._terms:
            parts = term.values(inputs)
            value = torch.stack(parts).sum()
            total = total + term.weight(epoch) * term.factor(share) * value
            values[term.key] = value.detach()
            if len(parts) > 1:
                values |= {f"{term.key}/{number}": part.detach() for number, part in enumerate(parts)}
        return total, values

    @property
    def temperatures(self) -> tuple[float, ...]:
        """At which terms read a teacher's logits, ascending."""
        return tuple(sorted({term.temperature for term in self._terms if "teacher_BK" in term.required}))

    @property
    def needs_labels(self) -> bool:
        """Some term averages over labelled rows."""
        return self._needs("labels_B")

    @property
    def needs_logits(self) -> bool:
        """Some term needs the teacher's logits."""
        return self._needs("teacher_BK")

    @property
    def trains_head(self) -> bool:
        """Some term reads the student's logits; otherwise its head gets no gradient."""
        return self._needs("student_BK")

    @property
    def needs_class_means(self) -> bool:
        """Some term needs the teacher's class means."""
        return self._needs("class_directions")

    @property
    def needs_teacher_embedding(self) -> bool:
        """Some term needs the teacher's embedding of each row."""
        return self._needs("teacher_BD")

    @property
    def projected(self) -> tuple[str, ...]:
        """The keys of the terms that take the student's embedding in a teacher's width, by separate projectors."""
        return tuple(term.key for term in self._terms if "student_BD" in term.required)

    def _needs(self, name: str) -> bool:
        return any(name in term.required for term in self._terms)


def _keys(terms: Sequence[LossConfig]) -> list[str]:
    """``kd``, ``ce``, ``kd_2``: the names of the terms, numbered from the second occurrence."""
    names = [term.name for term in terms]
    counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [name if count == 1 else f"{name}_{count}" for name, count in zip(names, counts, strict=True)]


def _term(key: str, section: LossConfig) -> _Term:
    loss = LOSSES[section.name]
    options = section.model_dump(exclude={"name", *LossSection.model_fields, *section.network_keys})
    parameters = inspect.signature(loss).parameters
    from_batch = parameters.keys() - options.keys()
    optional = {name for name in from_batch if parameters[name].default is None}
    if options.get("gather"):
        optional.discard("sum_over_ranks")
    return _Term(key, section, loss, frozenset(from_batch - optional), frozenset(optional), options)
