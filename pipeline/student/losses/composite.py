"""The loss section of a config as one function: weights, warm-up, and factors that make DDP's mean exact."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from pipeline.core.errors import ConfigError, TrainingError
from pipeline.student.data.teacher_outputs import Reads
from pipeline.student.losses.inputs import PARAMETERS, LossInputs, Parameter, TeacherInputs
from pipeline.student.losses.registry import BY_KIND, SAMPLED_LOSSES
from pipeline.tasks import EMBEDDING, TOKENS, HeadKind, Task, TaskHead
from schemas.config import HeadLossSection, LossConfig, TokenLossSection

_KINDS: dict[HeadKind, str] = {
    "class": "heads with one class a sample",
    "multilabel": "multilabel heads",
    "map": "maps of logits",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShare:
    """This rank's part of the global batch of one step.

    DDP averages the ranks' gradients. A term that is a mean over ``num`` of ``num_global`` valid rows is therefore
    multiplied by ``num · W / num_global``, so that the mean over ranks is the mean over the global batch. Tensors are
    0-d and on the batch's device, so that no step waits for a count.

    Attributes:
        num_labelled, num_labelled_global: rows that have a target, by its column; of a target of views, the pixels
            that have a class.
    """

    world_size: int
    num_rows: int | Tensor
    num_rows_global: int | Tensor
    num_labelled: Mapping[str, int | Tensor]
    num_labelled_global: Mapping[str, int | Tensor]

    @property
    def row_factor(self) -> float | Tensor:
        """Factor of a term that averages over all rows; 0 if no rank has any."""
        return self._factor(self.num_rows, self.num_rows_global)

    def labelled_factor(self, column: str) -> float | Tensor:
        """Factor of a term that averages over the rows that have this target; 0 if no rank has any."""
        return self._factor(self.num_labelled[column], self.num_labelled_global[column])

    def _factor(self, num: int | Tensor, num_global: int | Tensor) -> float | Tensor:
        divisor = num_global.clamp_min(1) if isinstance(num_global, Tensor) else max(num_global, 1)
        return num * self.world_size / divisor


@dataclass(frozen=True, slots=True)
class _Binding:
    """The function of a term, for one head if it takes the logits or the target of one."""

    head: TaskHead | None
    loss: Callable[..., Tensor]
    options: Mapping[str, Any]
    required: Mapping[str, Parameter]
    optional: Mapping[str, Parameter]

    def names(self, *sources: str) -> list[str]:
        """Of the required inputs from these sources."""
        return [str(parameter.name) for parameter in self.required.values() if parameter.source in sources]

    @property
    def target(self) -> str | None:
        """The column of its (first) target, whose rows its mean is over; None: it is over all rows."""
        return next(iter(self.names("target")), None)

    def teachers(self, inputs: LossInputs, temperature: float) -> dict[int, TeacherInputs]:
        """Those that the loss is computed for, by their positions: of several, those that have the head."""
        if not any(parameter.is_of_teacher for parameter in self.required.values()):
            return {}
        outputs = self.names("teacher output")
        numbered = dict(enumerate(inputs.teachers))
        if self.head is None or len(numbered) < 2:
            return numbered
        return {
            number: teacher
            for number, teacher in numbered.items()
            if all(teacher.outputs.at(name, temperature) is not None for name in outputs)
        }


@dataclass(frozen=True, slots=True)
class _Term:
    """One entry of the loss section, with its function for each of its heads."""

    key: str
    section: LossConfig
    bindings: tuple[_Binding, ...]
    options: dict[str, Any]

    def factor(self, binding: _Binding, share: BatchShare) -> float | Tensor:
        """The factor that makes DDP's mean over ranks the mean over the global batch."""
        if self.options.get("gather"):
            return 1.0
        return share.row_factor if binding.target is None else share.labelled_factor(binding.target)

    def names(self, *sources: str) -> list[str]:
        """Of the required inputs from these sources."""
        return [name for binding in self.bindings for name in binding.names(*sources)]

    def weight(self, epoch: int) -> float:
        """The weight in a 0-based epoch. Warm-up starts at 0 for the whole first epoch (Wang 2023)."""
        warmup_epochs = self.section.warmup_epochs
        return self.section.weight * (min(1.0, epoch / warmup_epochs) if warmup_epochs else 1.0)

    @property
    def temperature(self) -> float:
        """At which this term takes the teacher's outputs; 1 for a loss without temperature."""
        return self.options.get("temperature", 1.0)

    def details(self, binding: _Binding, parts: Mapping[int, Tensor], total: Tensor) -> dict[str, Tensor]:
        """Values of one head and of single teachers, where there are several: ``kd/HEAD``, ``kd/0``, ``kd/HEAD/0``."""
        key, by_key = self.key, dict[str, Tensor]()
        if len(self.bindings) > 1 and binding.head is not None:
            key = f"{key}/{binding.head.name}"
            by_key[key] = total
        return by_key | {f"{key}/{number}": part for number, part in parts.items() if len(parts) > 1}

    def values(self, binding: _Binding, inputs: LossInputs) -> tuple[Tensor, dict[int, Tensor]]:
        """The value, and that of each teacher by its position if the loss takes an input of the teacher: the value is
        their sum, with the teachers' weights."""
        teachers = binding.teachers(inputs, self.temperature) or {0: None}
        parts = {number: self._value(binding, inputs, teacher) for number, teacher in teachers.items()}
        weighted = [part if (teacher := teachers[at]) is None else teacher.weight * part for at, part in parts.items()]
        return torch.stack(weighted).sum(), parts

    def _value(self, binding: _Binding, inputs: LossInputs, teacher: TeacherInputs | None) -> Tensor:
        values = {
            name: parameter.value(inputs, teacher, term=self.key, temperature=self.temperature)
            for name, parameter in {**binding.required, **binding.optional}.items()
        }
        missing = sorted(name for name in binding.required if values[name] is None)
        if missing:
            raise TrainingError(
                f"the loss {self.key} lacks inputs",
                code="loss.missing-input",
                where="LossInputs of one batch",
                got=f"None for {', '.join(missing)}",
                expected=", ".join(sorted(binding.required)),
                next_step="fill them; the properties of CompositeLoss list what the terms take",
            )
        return binding.loss(**values, **binding.options)


class CompositeLoss:
    """The weighted sum of the terms of a config's loss section.

    Args:
        terms: the ``loss`` section, in its order. The same loss may occur several times, for example at two
            temperatures.
        task: of the training rows.
        where: the config, for messages.

    Raises:
        ConfigError: the section is empty; a loss does not take the targets and outputs of the task; or it names a head
            that does not exist, or is of a kind that the loss does not take.
    """

    def __init__(self, terms: Sequence[LossConfig], task: Task, *, where: str) -> None:
        if not terms:
            raise ConfigError(
                "the loss section is missing",
                code="config.no-loss",
                where=where,
                expected=f"one or more of {', '.join(sorted(set().union(*BY_KIND.values())))}",
                next_step="add a section such as  loss: [{name: kd, weight: 1.0, temperature: 4.0}]",
            )
        self._terms = [
            _term(key, section, task, where=f"{where}.{number}")
            for number, (key, section) in enumerate(zip(_keys(terms), terms, strict=True))
        ]

    def __call__(self, inputs: LossInputs, share: BatchShare, *, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the total loss and the value of each term.

        Args:
            inputs: this rank's batch.
            share: this rank's part of the global batch.
            epoch: 0-based, for warm-up.

        Returns:
            The total, an fp32 scalar, weighted and scaled for DDP's mean over ranks, on which to call ``backward``; and
            by term (``kd``, ``kd_2``, …) the fp32 mean over this rank's valid rows, unweighted, unscaled and detached.
            With several teachers a term is summed over those that have its head (FunMatch, Beyer 2022), with their
            weights, and ``kd/0``, ``kd/1``, … are the unweighted values of the individual teachers. With several heads
            it is summed over them, and ``kd/HEAD`` is the value of one.

        Raises:
            TrainingError: the batch lacks an input of a term.
        """
        summands, values = self.summands(inputs, share, epoch=epoch)
        return self.total(inputs, summands), values

    def summands(
        self, inputs: LossInputs, share: BatchShare, *, epoch: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of a call with these arguments: the weighted and scaled summands of the total by term, on the graph, and the
        values."""
        summands: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        for term in self._terms:
            scaled: list[Tensor] = []
            of_heads: list[Tensor] = []
            details: dict[str, Tensor] = {}
            for binding in term.bindings:
                value, parts = term.values(binding, inputs)
                of_heads.append(value)
                scaled.append(term.weight(epoch) * term.factor(binding, share) * value)
                details |= term.details(binding, parts, value)
            summands[term.key] = reduce(torch.add, scaled)
            values |= {key: value.detach() for key, value in {term.key: torch.stack(of_heads).sum(), **details}.items()}
        return summands, values

    def total(self, inputs: LossInputs, summands: Mapping[str, Tensor]) -> Tensor:
        """The sum of ``summands``."""
        # A 0 that depends on the outputs that no term reads: DDP would wait for the gradients of their layers.
        read = self.student_outputs
        unread = [output[:0].float().sum() for name, output in inputs.outputs.items() if name not in read]
        return reduce(torch.add, [*unread, *summands.values()])

    @property
    def teacher_outputs(self) -> Reads:
        """The teacher outputs that terms need for each row."""
        reads: dict[str, set[float]] = {}
        for term in self._terms:
            for name in term.names("teacher output"):
                reads.setdefault(name, set()).add(term.temperature)
        return {name: tuple(sorted(temperatures)) for name, temperatures in reads.items()}

    def terms_that_read(self, name: str) -> list[str]:
        """The keys of the terms that need this output of a teacher."""
        return [term.key for term in self._terms if name in term.names("teacher output")]

    def terms_without_samples(self, name: str) -> list[str]:
        """The keys of the terms that need this output of a teacher, and all of its classes in each row."""
        return [
            term.key
            for term in self._terms
            if any(
                name in binding.names("teacher output") and binding.loss not in SAMPLED_LOSSES
                for binding in term.bindings
            )
        ]

    @property
    def student_outputs(self) -> frozenset[str]:
        """The student outputs that terms read, as they are or projected."""
        return frozenset(name for term in self._terms for name in term.names("student output", "projected output"))

    @property
    def trains_head(self) -> bool:
        """Some term reads a student output that is that of a head; otherwise no head gets a gradient."""
        return bool(self.student_outputs - {EMBEDDING, TOKENS})

    @property
    def targets(self) -> tuple[str, ...]:
        """The columns of the targets over whose rows terms average."""
        columns = [binding.target for term in self._terms for binding in term.bindings]
        return tuple(dict.fromkeys(column for column in columns if column is not None))

    @property
    def heads_of_class_means(self) -> tuple[TaskHead, ...]:
        """The heads for whose classes some term needs the teacher's class means."""
        return self._heads_that_need("class directions")

    @property
    def heads_of_priors(self) -> tuple[TaskHead, ...]:
        """The heads for whose classes some term needs their frequencies."""
        return self._heads_that_need("log prior")

    def _heads_that_need(self, source: str) -> tuple[TaskHead, ...]:
        bindings = [binding for term in self._terms for binding in term.bindings if binding.names(source)]
        return tuple(dict.fromkeys(binding.head for binding in bindings if binding.head is not None))

    @property
    def heads_by_term(self) -> tuple[tuple[LossConfig, tuple[TaskHead, ...]], ...]:
        """The sections in their order, each with the heads that it is computed for."""
        return tuple(
            (term.section, tuple(binding.head for binding in term.bindings if binding.head is not None))
            for term in self._terms
        )

    @property
    def heads(self) -> dict[str, tuple[str, ...]]:
        """By the key of a term, the names of the heads that it is computed for; only heads that have names."""
        names = {term.key: [binding.head.name for binding in term.bindings if binding.head] for term in self._terms}
        return {key: tuple(name for name in heads if name is not None) for key, heads in names.items() if any(heads)}

    @property
    def projected(self) -> tuple[str, ...]:
        """The keys of the terms that take the embedding in a teacher's width, by separate projectors."""
        return tuple(term.key for term in self._terms if EMBEDDING in term.names("projected output"))

    @property
    def token_layers(self) -> dict[str, str]:
        """The layer of the student's patch tokens, by the key of each term that compares them."""
        return {
            term.key: term.section.student_layer for term in self._terms if isinstance(term.section, TokenLossSection)
        }


def _keys(terms: Sequence[LossConfig]) -> list[str]:
    """``kd``, ``ce``, ``kd_2``: the names of the terms, numbered from the second occurrence."""
    names = [term.name for term in terms]
    counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [name if count == 1 else f"{name}_{count}" for name, count in zip(names, counts, strict=True)]


def _term(key: str, section: LossConfig, task: Task, *, where: str) -> _Term:
    functions: dict[HeadKind, Callable[..., Tensor]] = {
        kind: losses[section.name] for kind, losses in BY_KIND.items() if section.name in losses
    }
    heads = (
        _heads_of(section.name, section.heads, functions, task, where)
        if isinstance(section, HeadLossSection)
        else (None,)
    )
    bindings = tuple(
        _bind(functions["class" if head is None else head.kind], head, section, where=where) for head in heads
    )
    unknown = {
        f"{parameter.source} {parameter.name}"
        for binding in bindings
        for parameter in binding.required.values()
        if not parameter.is_in(task)
    }
    if unknown or not bindings:
        raise ConfigError(
            f"this loss does not take the targets and outputs of the task {task.name}",
            code="loss.other-task",
            where=f"{where}.name",
            got=section.name + (f", which takes {', '.join(sorted(unknown))}" if unknown else ""),
            next_step="name a loss of this task, or set data.task to the task of the loss",
        )
    return _Term(key, section, bindings, section.arguments)


def _heads_of(
    loss: str, names: Sequence[str], kinds: Collection[HeadKind], task: Task, where: str
) -> tuple[TaskHead, ...]:
    """The heads of these names; without names, all of a kind that the loss takes."""
    by_name = {head.name: head for head in task.heads if head.name is not None}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ConfigError(
            "a loss names a head that the data do not have",
            code="loss.unknown-head",
            where=f"{where}.heads",
            got=", ".join(unknown),
            expected=f"some of {', '.join(by_name)}" if by_name else "no heads, which only data.task=heads has",
        )
    other = [name for name in names if by_name[name].kind not in kinds]
    if other:
        raise ConfigError(
            f"{loss} does not take heads of this kind",
            code="loss.other-kind-of-head",
            where=f"{where}.heads",
            got=", ".join(f"{name} ({by_name[name].kind})" for name in other),
            expected=f"heads of kind {', '.join(kinds)}",
            next_step="remove them, and add a term whose loss takes them, such as bce or kd",
        )
    heads = tuple(by_name[name] for name in names) or task.heads
    return tuple(head for head in heads if head.kind in kinds)


def _bind(loss: Callable[..., Tensor], head: TaskHead | None, section: LossConfig, *, where: str) -> _Binding:
    """
    Raises:
        ConfigError: the section has an option that the function for this kind of head lacks.
    """
    parameters = inspect.signature(loss).parameters
    options = {**section.arguments, **({} if head is None else head.arguments)}
    for key in section.arguments.keys() - parameters.keys():
        if getattr(section, key) != type(section).model_fields[key].default:
            assert head is not None, "a loss that takes nothing of a head takes all keys of its section"
            raise ConfigError(
                f"{section.name} has no {key} for {_KINDS[head.kind]}",
                code="loss.option-of-other-head",
                where=f"{where}.{key}",
                got=options[key],
                next_step=f"remove {key}",
            )
    options = {key: value for key, value in options.items() if key in parameters}
    optional = {name for name in parameters if name in PARAMETERS and parameters[name].default is None}
    if options.get("gather"):
        optional -= {"sum_over_ranks", "join_over_ranks"}
    if options.get("prior"):
        optional -= {"log_prior_K"}
    if options.get("aux_weight"):
        optional -= {"aux_BKhw"}
    required = parameters.keys() - options.keys() - optional
    return _Binding(
        head,
        loss,
        options,
        {name: PARAMETERS[name].of(head) for name in sorted(required)},
        {name: PARAMETERS[name].of(head) for name in sorted(optional)},
    )
