"""The contract of a task's metrics: what each of them is, how images are added, which of them selects a checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor, nn

from pipeline.core.errors import ConfigError
from pipeline.student.distributed import DistributedContext
from pipeline.student.evaluation.metrics.reference import Reference
from pipeline.tasks import Targets
from schemas.config import DataConfig

Outputs = Mapping[str, Tensor]
"""Outputs of one network for N images by name, [N,…] each, fp32 on the CPU."""

BACKBONE = "backbone"
"""The student's embedding before a projector, in the outputs of a student whose embedding is projected."""

Need = str
"""``targets``; ``domain``; ``teacher``; ``projector``: a loss compares embeddings; ``reference``: embeddings of
labelled images; ``probe``: a classifier is fitted to them; or the name of a student output, whose head must be trained.
"""

Values = Mapping[str, float | int | None]
"""Numbers by key; None for one that was not measured."""


class Scale(NamedTuple):
    """How numbers of a unit are shown: times ``factor``, with ``digits`` decimals and the symbol."""

    symbol: str
    factor: int
    digits: int


_SCALES = {"share": Scale("%", 100, 1), "nats": Scale("nats", 1, 4), "none": Scale("", 1, 4)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One number of an evaluation.

    Attributes:
        key: in JSON, events, checkpoints and curves; ``NAME``, or ``HEAD/NAME`` for one head of several.
        title: in tables and messages.
        unit: ``share``: from 0 to 1, shown in percent.
        needs: without any of these the metric is not measured.
        teacher_outputs: names of the teacher's outputs that it reads.
        teacher_key: of the metric that is the same number of the teacher.
        gauge: meaning of the Ray metric ``train_NAME``, or ``train_head_NAME`` with a label ``head``; None: there is
            none.
    """

    key: str
    title: str
    unit: Literal["share", "nats", "none"] = "share"
    higher_is_better: bool = True
    needs: tuple[Need, ...] = ()
    teacher_outputs: tuple[str, ...] = ()
    teacher_key: str | None = None
    # Whether Ray has it or not, it is the same metric.
    gauge: str | None = field(default=None, compare=False)

    @property
    def scale(self) -> Scale:
        return _SCALES[self.unit]

    @property
    def heading(self) -> str:
        """``TITLE, %``: the heading of a column of numbers without unit."""
        return ", ".join(filter(None, (self.title, self.scale.symbol)))

    def text(self, value: float | None, *, digits: int = 1) -> str:
        """``97.2 %``, or a dash for None. ``digits`` are those of a percentage."""
        if value is None:
            return "-"
        scale = self.scale
        number = f"{scale.factor * value:.{digits if self.unit == 'share' else scale.digits}f}"
        return f"{number} {scale.symbol}".rstrip()


@dataclass(frozen=True, slots=True)
class EvaluationScope:
    """Which metrics apply to a student, besides what targets and teacher allow.

    Attributes:
        untrained: names of the student's outputs that no loss read, and whose heads began with random weights. They are
            not measured.
        projector: from the student's embedding to the teacher's width, if a loss compares embeddings.
        standardize: applied to the teacher's embeddings, as losses compare them; None: they compare them as they are.
        reference: embeddings of labelled images by the same student.
    """

    untrained: frozenset[str] = frozenset()
    projector: nn.Module | None = None
    standardize: Callable[[Tensor], Tensor] | None = None
    reference: Reference | None = None

    @property
    def head_trained(self) -> bool:
        """Whether all heads are trained."""
        return not self.untrained

    def missing(self, *, teacher: bool) -> set[Need]:
        """What metrics may need and do not get, but for targets and domains.

        Args:
            teacher: whether there is one.
        """
        given: dict[Need, bool] = {
            "teacher": teacher,
            "projector": self.projector is not None,
            "reference": self.reference is not None,
            "probe": self.reference is not None and self.reference.fits_probe,
        }
        return {*self.untrained, *(need for need, is_given in given.items() if not is_given)}


class MetricSums(ABC):
    """Sums of a task's metrics over the images of one rank."""

    @abstractmethod
    def add(self, student: Outputs, teacher: Outputs | None, targets: Targets) -> None:
        """Adds N rows, whose outputs must be finite; the student's embedding is in the teacher's width."""

    @abstractmethod
    def finish(self, distributed: DistributedContext) -> dict[str, float | None]:
        """The metrics over all ranks by key, each of which must call it; None: no row was measured."""

    def by_row(self) -> dict[str, Tensor]:
        """Of those metrics by key that are means over rows and that tables compare: their values for the rows of this
        rank, fp64 [N] in the order of ``add``; NaN for a row that does not count. To be called after ``finish``."""
        return {}

    def per_class(self) -> dict[str, list[float | None]]:
        """Numbers of each class by key, [K], over all ranks; None for a class that does not occur. To be called after
        ``finish``."""
        return {}

    def by_domain(self) -> dict[str, Values]:
        """The metrics of each domain and its number of rows (``num_rows``), over all ranks. To be called after
        ``finish``."""
        return {}


class RowMeans:
    """Means over rows, each over those rows for which its quantity was added."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._sums = {key: [0.0, 0.0] for key in keys}
        self._rows: dict[str, list[Tensor]] = {}

    def add(self, key: str, total: float, num_rows: int) -> None:
        """Adds the sum of a quantity over some rows."""
        self._sums[key][0] += total
        self._sums[key][1] += num_rows

    def add_each(self, key: str, value_N: Tensor) -> None:
        """Adds a quantity of N rows, NaN where it does not count, and stores it for ``by_row``."""
        counted_M = value_N[~value_N.isnan()]
        self.add(key, float(counted_M.sum()), len(counted_M))
        self._rows.setdefault(key, []).append(value_N)

    def by_row(self) -> dict[str, Tensor]:
        """Quantities of ``add_each`` by key, fp64 [N], of this rank."""
        return {key: torch.cat(values) for key, values in self._rows.items()}

    def over_ranks(self, distributed: DistributedContext) -> dict[str, float | None]:
        """By key; None without rows. Every rank calls it."""
        sums = torch.tensor([*self._sums.values()], dtype=torch.float64, device=distributed.device)
        totals: list[list[float]] = distributed.sum(sums).tolist()
        pairs = zip(self._sums, totals, strict=True)
        return {key: total / num_rows if num_rows else None for key, (total, num_rows) in pairs}


@dataclass(frozen=True, slots=True)
class Score:
    """The metric that selects the best checkpoint, by its key."""

    metric: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSet:
    """The metrics of one task.

    Attributes:
        metrics: in the order of JSON and tables.
        selection: the first of these that was measured selects the best checkpoint.
        table: those that a table of several students has.
        worst_domain: those whose lowest value over domains is a metric too, where the images have domains.
        sums: builds empty sums. The config is that of the images; the device is the one that evaluates.
    """

    metrics: tuple[Metric, ...]
    selection: tuple[str, ...]
    table: tuple[str, ...]
    worst_domain: tuple[str, ...] = ()
    sums: Callable[[DataConfig, EvaluationScope, torch.device], MetricSums]

    def __getitem__(self, key: str) -> Metric:
        return next(metric for metric in self.metrics if metric.key == key)

    @property
    def main(self) -> Metric:
        """The metric that selects the best checkpoint if all can be measured."""
        return self[self.selection[0]]

    @property
    def columns(self) -> list[Metric]:
        """Those of ``table``."""
        return [self[key] for key in self.table]

    @property
    def without_teacher(self) -> list[Metric]:
        """Those that need no teacher."""
        return [metric for metric in self.metrics if "teacher" not in metric.needs]

    def teacher_outputs(self, scope: EvaluationScope) -> set[str]:
        """Names of the teacher's outputs that metrics of this scope read."""
        missing = scope.missing(teacher=True)
        return {name for metric in self.metrics if missing.isdisjoint(metric.needs) for name in metric.teacher_outputs}

    def selected_without(self, missing: Set[Need]) -> Metric | None:
        """The metric that selects the best checkpoint where these are missing; None: there is none."""
        metrics = map(self.__getitem__, self.selection)
        return next((metric for metric in metrics if missing.isdisjoint(metric.needs)), None)

    def selecting(self, key: str) -> MetricSet:
        """These metrics, of which this one alone selects the best checkpoint.

        Raises:
            ConfigError: there is no such metric.
        """
        if key not in self.keys:
            raise ConfigError(
                "the validation images of this config have no such metric",
                code="config.unknown-metric",
                where="train.best",
                got=key,
                expected=", ".join(self.keys),
                next_step="name one of these; metrics of heads need data.heads, those of worst_domain data.domain",
            )
        return replace(self, selection=(key,))

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(metric.key for metric in self.metrics)

    def score(self, values: Values) -> Score | None:
        """None if no metric of the selection was measured."""
        measured = ((key, values.get(key)) for key in self.selection)
        return next((Score(key, value) for key, value in measured if value is not None), None)

    def text(self, score: Score) -> str:
        """``TITLE 97.21 %``."""
        return f"{self[score.metric].title} {self[score.metric].text(score.value, digits=2)}"

    def is_better(self, score: Score, best: Score | None) -> bool:
        """Equal values are no improvement; another metric starts a new comparison."""
        if best is None or best.metric != score.metric:
            return True
        return score.value > best.value if self[score.metric].higher_is_better else score.value < best.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Metrics of a student.

    Attributes:
        definitions: the metrics, in the order of the task.
        metrics: their values by key, in the same order; None for a metric that was not measured.
        untrained: see ``EvaluationScope``; sorted.
        per_class: see ``MetricSums.per_class``.
        class_names: of the values of ``per_class``, by its keys, where the data names classes.
        by_domain: see ``MetricSums.by_domain``; empty where images have no domains.
        images: a row for each image that this rank has read, in this order, with the columns ``shard``, ``sample`` and,
            by key, those of ``MetricSums.by_row``; null for a row that does not count. None: not stored.
    """

    definitions: tuple[Metric, ...]
    num_rows: int
    metrics: Mapping[str, float | None]
    untrained: Sequence[str] = ()
    per_class: Mapping[str, Sequence[float | None]] = field(default_factory=dict[str, Sequence[float | None]])
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    by_domain: Mapping[str, Values] = field(default_factory=dict[str, Values])
    images: pa.Table | None = field(default=None, compare=False, repr=False)

    def value_of(self, metric: Metric) -> float | None:
        """None also for a metric of another task."""
        return self.metrics[metric.key] if metric in self.definitions else None

    @property
    def head_trained(self) -> bool:
        """Whether all heads are trained."""
        return not self.untrained

    def as_dict(self) -> dict[str, Any]:
        untrained = {"untrained_outputs": [*self.untrained]} if self.untrained else {}
        names = {"class_names": self.class_names} if self.class_names else {}
        return {**self.measured(), "head_trained": self.head_trained, **untrained, **self.tables(), **names}

    def measured(self) -> dict[str, float | int | None]:
        """Only the numbers."""
        return {"num_rows": self.num_rows, **self.metrics}

    def tables(self) -> dict[str, Mapping[str, Any]]:
        """``per_class`` and ``by_domain`` by these names, without empty ones."""
        tables = {"per_class": self.per_class, "by_domain": self.by_domain}
        return {name: table for name, table in tables.items() if table}
