"""The loss section of a config as one function: weights, warm-up, and shares that make DDP's mean exact."""

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
from pipeline.student.losses.ce import ce
from pipeline.student.losses.dist import SumOverRanks, dist
from pipeline.student.losses.dkd import dkd
from pipeline.student.losses.embedding import cosine, mse, sifn
from pipeline.student.losses.hard import hard
from pipeline.student.losses.hcl import hcl
from pipeline.student.losses.kd import kd
from pipeline.student.losses.nd import ClassDirections, nd
from schemas.config import LossConfig, LossSection

# A loss says what it needs by its parameters: those named like an attribute of LossInputs are filled from the batch,
# those named in TeacherInputs.at from a teacher, the others are the keys of its section in the YAML. A loss that takes
# labels averages over the labelled rows; one that takes anything of a teacher is summed over the teachers. One whose
# section has ``gather: true`` is of the global batch already, on every rank.
LOSSES: Mapping[str, Callable[..., Tensor]] = {
    "ce": ce,
    "cosine": cosine,
    "dist": dist,
    "dkd": dkd,
    "hard": hard,
    "kd": kd,
    "mse": mse,
    "nd": nd,
    "review_kd": hcl,
    "sifn": sifn,
}


_OF_TEACHER = frozenset(
    {"teacher_BK", "teacher_norm_B", "teacher_BD", "student_BD", "class_directions", "student_maps", "teacher_maps"}
)
# Keys of a section that say how networks are built and asked, not how the loss is computed.
_OF_NETWORKS = frozenset({"student_layers", "teacher_layers", "mid_channels", "embedding"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherInputs:
    """One teacher beside one batch, on its device."""

    words: TeacherOutputs
    projected: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """The student's embedding in this teacher's width, by the key of the term that takes it."""
    class_directions: ClassDirections | None = None
    student_maps: tuple[Tensor, ...] | None = None
    """[B,C,H,W] a level, fused into the shapes of ``teacher_maps``."""
    teacher_maps: tuple[Tensor, ...] | None = None

    def at(self, key: str, temperature: float) -> dict[str, Any]:
        """What the term of this key may take of the teacher, by parameter, with logits for its temperature."""
        return {
            "teacher_BK": self.words.logits_at(temperature),
            "teacher_norm_B": self.words.norm_B,
            "teacher_BD": self.words.embedding_BD,
            "student_BD": self.projected.get(key),
            "class_directions": self.class_directions,
            "student_maps": self.student_maps,
            "teacher_maps": self.teacher_maps,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """What one rank knows about one batch, all on one device. B is the rank's own number of rows."""

    student_BK: Tensor  # logits
    labels_B: Tensor  # int64, -1: none
    embedding_BD: Tensor | None = None  # the student's own, in its own width
    teachers: tuple[TeacherInputs, ...] = ()
    partner_B: Tensor | None = None  # int64, each row's mixup partner as a position in this batch; None: not mixed
    lambda_B: Tensor | None = None  # each row's own share of its mixed pixels; comes with partner_B
    sum_over_ranks: SumOverRanks | None = None  # for terms that gather

    @property
    def mixed_labels_B(self) -> Tensor | None:
        """int64 ``[B]``, the partners' labels; None where the batch is not mixed."""
        return None if self.partner_B is None else self.labels_B[self.partner_B]

    @property
    def num_labelled(self) -> Tensor:
        """0-d int64 on the batch's device: rows over which losses with labels average. Sum it over ranks."""
        return is_labelled(self.labels_B, self.mixed_labels_B).sum()


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShare:
    """This rank's part of the global batch of one step.

    DDP takes the plain mean of the ranks' gradients. A term that is a mean over ``num`` of ``num_global`` valid rows
    therefore counts ``num · W / num_global`` here, and the mean over ranks is the mean over the global batch.
    Tensors are 0-d and on the batch's device, so that no step waits for a count.
    """

    world_size: int
    num_rows: int | Tensor
    num_rows_global: int | Tensor
    num_labelled: int | Tensor
    num_labelled_global: int | Tensor

    @property
    def of_rows(self) -> float | Tensor:
        """Factor of a term that averages over all rows; 0 where there are none on any rank."""
        return self._factor(self.num_rows, self.num_rows_global)

    @property
    def of_labelled(self) -> float | Tensor:
        """Factor of a term that averages over the labelled rows; 0 where there are none on any rank."""
        return self._factor(self.num_labelled, self.num_labelled_global)

    def _factor(self, num: int | Tensor, num_global: int | Tensor) -> float | Tensor:
        divisor = num_global.clamp_min(1) if isinstance(num_global, Tensor) else max(num_global, 1)
        return num * self.world_size / divisor


@dataclass(frozen=True, slots=True)
class _Term:
    """One entry of the loss section, ready to be called."""

    key: str
    section: LossSection
    loss: Callable[..., Tensor]
    required: frozenset[str]
    optional: frozenset[str]
    options: dict[str, Any]

    @property
    def uses_labels(self) -> bool:
        return "labels_B" in self.required

    def factor(self, share: BatchShare) -> float | Tensor:
        """What makes DDP's mean over ranks the mean over the global batch."""
        if "sum_over_ranks" in self.required:
            return 1.0
        return share.of_labelled if self.uses_labels else share.of_rows

    def weight(self, epoch: int) -> float:
        """The weight in a 0-based epoch: 0 in all of the first one while warming up (Wang 2023)."""
        warmup_epochs = self.section.warmup_epochs
        return self.section.weight * (min(1.0, epoch / warmup_epochs) if warmup_epochs else 1.0)

    @property
    def temperature(self) -> float:
        """Of the teacher's logits as this term sees them; 1 where it has none."""
        return self.options.get("temperature", 1.0)

    def values(self, inputs: LossInputs) -> list[Tensor]:
        """One for each teacher if the loss takes anything of a teacher, else one."""
        asks = bool(self.required & _OF_TEACHER)
        seen = [teacher.at(self.key, self.temperature) for teacher in inputs.teachers] if asks else []
        return [self._value(inputs, of_teacher) for of_teacher in seen or [{}]]

    def _value(self, inputs: LossInputs, of_teacher: Mapping[str, Any]) -> Tensor:
        tensors = {
            name: of_teacher.get(name) if name in _OF_TEACHER else getattr(inputs, name)
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
                next_step="ask what the composition needs (needs_labels and so on) before training, and fill it",
            )
        return self.loss(**tensors, **self.options)


class CompositeLoss:
    """The weighted sum of the terms of a config's loss section.

    Args:
        terms: the ``loss`` section, in its order. The same loss may occur several times (two temperatures, say).
        where: the config, for messages.

    Raises:
        ConfigError: there is no term.
    """

    def __init__(self, terms: Sequence[LossConfig], *, where: str) -> None:
        if not terms:
            raise ConfigError(
                "the loss section is missing",
                code="config.no-loss",
                where=where,
                expected=f"one or more of {', '.join(LOSSES)}",
                next_step="add a section such as  loss: [{name: kd, weight: 1.0, temperature: 4.0}]",
            )
        self._terms = [_term(key, section) for key, section in zip(_keys(terms), terms, strict=True)]

    def __call__(self, inputs: LossInputs, share: BatchShare, *, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The total to call ``backward`` on, and what each term was.

        Args:
            inputs: this rank's batch.
            share: this rank's part of the global batch.
            epoch: 0-based, for warm-up.

        Returns:
            fp32 scalar, weighted and scaled for DDP's mean over ranks; and by term (``kd``, ``kd_2``, …) the fp32 mean
            over this rank's valid rows, unweighted, unscaled and detached. Of several teachers a term is the sum, and
            ``kd/0``, ``kd/1``, … are each one's (FunMatch, Beyer 2022: losses of several teachers are summed).

        Raises:
            TrainingError: a term needs something that the batch does not carry.
        """
        # A 0 that hangs on the logits: where no term reads them, DDP would wait for the gradient of the head.
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
        """At which the terms read a teacher's logits, ascending; none where no term does."""
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
        """The keys of the terms that take the student's embedding in a teacher's width: each in one of its own."""
        return tuple(term.key for term in self._terms if "student_BD" in term.required)

    def _needs(self, name: str) -> bool:
        return any(name in term.required for term in self._terms)


def _keys(terms: Sequence[LossConfig]) -> list[str]:
    """``kd``, ``ce``, ``kd_2``: each term's name, numbered from its second occurrence."""
    names = [term.name for term in terms]
    counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [name if count == 1 else f"{name}_{count}" for name, count in zip(names, counts, strict=True)]


def _term(key: str, section: LossConfig) -> _Term:
    loss = LOSSES[section.name]
    options = section.model_dump(exclude={"name", *LossSection.model_fields, *_OF_NETWORKS})
    parameters = inspect.signature(loss).parameters
    from_batch = parameters.keys() - options.keys()
    optional = {name for name in from_batch if parameters[name].default is None}
    if options.get("gather"):
        optional.discard("sum_over_ranks")
    return _Term(key, section, loss, frozenset(from_batch - optional), frozenset(optional), options)
