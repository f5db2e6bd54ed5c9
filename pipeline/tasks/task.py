"""The contract of a task: what the target of a sample is, which outputs a teacher has, and which statistics count."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.tasks.view_geometry import grid_size
from schemas.cache_format import Statistics
from schemas.config import CacheConfig, Size

LABEL, LOGITS = "label", "logits"
"""The target column and the output of a head without a name; those of others end in ``_NAME`` and ``.NAME``."""

EMBEDDING = "embedding"
"""The output that the networks of all tasks have: [B,D], the input of their heads."""

AUX = "aux"
"""The output of networks with an auxiliary head that is trained like the final one and then left out: a map [B,K,h,w],
of tasks whose logits are maps."""

TOKENS = "tokens"
"""The output of teachers whose patch tokens are wanted, in all tasks: [B,P,D], the positions of a layer's output."""

DOMAIN = "domain"
"""The column of the domain of a sample, which is no target."""

Targets = Mapping[str, NDArray[Any]]
"""Target columns by name, [N,…] each; a row without a target consists of ``TargetColumn.missing``."""

HeadKind = Literal["class", "multilabel", "map"]

TeacherOutputs = Mapping[str, NDArray[np.float32]]
"""Outputs of a teacher by the names of ``OutputSpec``, [N,…] each."""


@dataclass(frozen=True, slots=True)
class TargetColumn:
    """A column that the index has for targets. Its name differs from those of ``index_schema``.

    This class stores one integer a row; a subclass converts integers of another shape to another type.

    Attributes:
        missing: stands in arrays for a sample without a target, which is null in the index.
    """

    name: str
    type: pa.DataType
    missing: Any

    def to_arrow(self, values_N: NDArray[Any]) -> pa.Array:
        return pa.array(values_N, self.type, mask=values_N == self.missing)

    def to_numpy(self, column: pa.ChunkedArray) -> NDArray[Any]:
        return column.fill_null(self.missing).to_numpy()

    def has_target(self, values_N: NDArray[Any]) -> NDArray[np.bool_]:
        """[N]"""
        return (values_N != self.missing).any(axis=tuple(range(1, values_N.ndim)))


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """An output that a cache may store for each row.

    Attributes:
        shape: without the batch.
        kind: the encoding by its name in ``cache``; ``none``: not stored.
    """

    name: str
    shape: tuple[int, ...]
    kind: str


@dataclass(frozen=True, slots=True)
class TaskHead:
    """Logits of student and teacher, and the target that they predict.

    Attributes:
        name: None: the only head, which has none.
        kind: class: one class a row, a softmax; multilabel: any number of classes, each with a sigmoid; map: one class
            and a softmax at each position of a row.
        num_classes: K; None: not known yet.
    """

    name: str | None
    kind: HeadKind
    num_classes: int | None

    @property
    def column(self) -> str:
        """Of the target, or the name of the task's ``view_target``."""
        return LABEL if self.name is None else f"{LABEL}_{self.name}"

    @property
    def arguments(self) -> Mapping[str, Any]:
        """Arguments of losses that the head determines, by name."""
        return {}

    @property
    def output(self) -> str:
        """The name of the logits."""
        return LOGITS if self.name is None else f"{LOGITS}.{self.name}"


class MapWidth(int):
    """The width K of logits that a network has at each position: maps [B,K,h,w]."""


class TargetMember(NamedTuple):
    """A member that may hold a target: its bytes, none if they are more than ``Task.max_bytes``, and where it is."""

    data: bytes
    offset: int
    size: int


class BadTargetError(ValueError):
    """A member that is no target. The reader of the shard adds sample and place.

    Attributes:
        member: its extension.
        what: label or domain.
        label: what is no label, if the member has more than that.
        head: whose label it is, if the head has a name.
    """

    def __init__(
        self,
        member: str,
        expected: str,
        *,
        next_step: str,
        what: str = "label",
        label: str | None = None,
        head: str | None = None,
    ) -> None:
        super().__init__(expected)
        self.member, self.expected, self.next_step = member, expected, next_step
        self.what, self.label, self.head = what, label, head


class UndecodableTargetError(Exception):
    """Bytes of a mask or of boxes that cannot be decoded; the text is the reason."""


class StatisticsAccumulator(ABC):
    """Sums the task's fields of ``Statistics``: over rows, and over the statistics of parts."""

    @abstractmethod
    def add(self, outputs: TeacherOutputs, targets: Targets) -> None:
        """Adds N rows that are not mixed: the teacher's fp32 outputs, and the targets of the same samples."""

    @abstractmethod
    def add_part(self, statistics: Statistics) -> None:
        """Adds an earlier result. A cache may have millions of parts: none of them may stay in memory."""

    @abstractmethod
    def result(self) -> dict[str, Any]:
        """The task's fields of ``Statistics``."""


class Recount(ABC):
    """Derives the task's statistics of one part again, from stored outputs and the targets of the index."""

    @abstractmethod
    def add_view(self, mix_lambda_M: NDArray[np.float32], rows: slice) -> None:
        """Adds rows of a view, whether or not their outputs are finite."""

    @abstractmethod
    def add_outputs(self, name: str, values: NDArray[np.float32], rows: slice, *, exact: bool) -> None:
        """Adds the decoded rows of one output.

        Args:
            exact: the order of the values is that of the teacher's fp32 outputs, except for ties.
        """

    @abstractmethod
    def compare(self, stated: Statistics, expect: Callable[[str, object, object], object]) -> None:
        """Calls ``expect(what, got, expected)`` for each figure of a commit: a problem if the last two differ."""


class Task(ABC):
    """One kind of target under one config. Immutable; equal configs have equal tasks."""

    name: ClassVar[str]
    member_content: ClassVar[str]
    """What a member with a target holds, for messages."""
    max_bytes: ClassVar[int]
    """Of a member with a target. A longer one is not read, and parsed as empty."""
    required_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of a config without which no network can be built for the task."""
    has_networks: ClassVar[bool] = True
    """Whether there are caches and students of the task; see ``network_keys``."""
    default_member: ClassVar[str] = "cls"
    """An extension of members with a target, for messages."""
    trains_on_targets: ClassVar[bool] = True
    """Whether networks of the task learn targets. Otherwise these are for evaluation alone, and data need have none."""
    view_target: ClassVar[str | None] = None
    """The name of the target of a view, of tasks whose targets are at places of an image: ``target_of_view``. None: a
    view has the target of its sample, which is in ``columns``."""
    embedding: ClassVar[str | None] = EMBEDDING
    """The output that ``embedding_norm`` of a part is the norm of, and that class means average; None: there is none,
    and the norm is 0."""

    @classmethod
    @abstractmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """The task of a ``data`` section, or of an index with these settings.

        Raises:
            ValueError: the settings are not valid.
        """

    def of_shard(self, shard_id: str) -> Task:
        """The task of samples of this shard, which may determine their domain."""
        del shard_id
        return self

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Keys of ``data`` that determine the target columns together with the tar; part of an index's settings."""

    @property
    @abstractmethod
    def members(self) -> tuple[str, ...]:
        """Extensions, in lower case, of the members that hold the target; empty: no targets are read."""

    @property
    def read_members(self) -> tuple[str, ...]:
        """All members that ``parse`` takes: also one with a domain."""
        return self.members

    @property
    @abstractmethod
    def columns(self) -> tuple[TargetColumn, ...]: ...

    @property
    @abstractmethod
    def statistics_fields(self) -> tuple[str, ...]:
        """Fields of ``Statistics`` that depend on targets, and therefore change when targets are read again."""

    @property
    @abstractmethod
    def statistics_outputs(self) -> tuple[str, ...]:
        """The outputs from which these fields are computed."""

    @property
    def heads(self) -> tuple[TaskHead, ...]:
        """Those whose targets are classes."""
        return ()

    @property
    def class_names(self) -> Mapping[str | None, tuple[str, ...]]:
        """Names of the classes 0 … K - 1, by the name of each head whose classes have names."""
        return {}

    @property
    def num_classes(self) -> int:
        """How many classes ``class_ids`` may return: those of all class heads; 0: the task has no class means."""
        return sum(head.num_classes or 0 for head in self.heads if head.kind == "class")

    def class_range(self, head: TaskHead) -> slice:
        """Where the classes of a class head lie among those of ``class_ids``."""
        before = self.heads[: self.heads.index(head)]
        first = sum(other.num_classes or 0 for other in before if other.kind == "class")
        return slice(first, first + (head.num_classes or 0))

    @abstractmethod
    def parse(self, texts: Mapping[str, bytes]) -> Any | None:
        """The target in the members of a sample; None: it has none.

        Args:
            texts: bytes by extension, of those ``read_members`` that the sample has.

        Raises:
            BadTargetError: a member is no valid target.
        """

    def parse_members(self, members: Mapping[str, TargetMember]) -> Any | None:
        """``parse`` of their bytes, for tasks that do not store where a target is."""
        return self.parse({extension: member.data for extension, member in members.items()})

    def check_target(self, target: Any | None, width: int, height: int) -> str | None:
        """Why a target cannot be that of an image of this size, in pixels after rotation; None: it can. The sample is
        then a bad one, of status ``bad_target``."""
        del target, width, height
        return None

    def without_content(self, target: Any | None) -> Any | None:
        """What ``rows`` needs of a target, which is kept for all samples of a shard."""
        return target

    def target_data(self, target: Any | None) -> bytes | None:
        """The bytes of a target that ``parse_members`` returned, for ``decode_target``; None: the sample has no target.

        Of tasks with a ``view_target``, like the next two methods.
        """
        raise NotImplementedError(f"{self.name} has no targets of views, but {type(target).__name__}")

    def decode_target(self, data: bytes) -> Any:
        """The target of an image, to be decoded once for all its views.

        Raises:
            UndecodableTargetError: ``check_target`` refuses it as well.
        """
        raise NotImplementedError(f"{self.name} has no targets of views")

    def target_of_view(self, target: Any | None, box: Sequence[int], flip: bool, size: tuple[int, int]) -> NDArray[Any]:
        """The target of a view, of the same shape and type for all images.

        Args:
            target: of the image, as ``decode_target`` returns it; None: the image has none.
            box: (left, top, width, height) in pixels of the upright image; may reach beyond it to the right and below.
            size: height and width of the view.
        """
        raise NotImplementedError(f"{self.name} has no targets of views")

    def hint(self, error: BadTargetError, samples: Sequence[Mapping[str, bytes]]) -> str:
        """The next step after an error of ``parse``: keys that would read the labels of these samples.

        Args:
            samples: ``texts`` of a shard's samples, in part.
        """
        del samples
        return error.next_step

    @abstractmethod
    def try_parse(self, texts: Mapping[str, bytes]) -> Any | None:
        """The target that ``parse`` returns, or would return under a config with other limits; None: neither."""

    @abstractmethod
    def is_target(self, text: bytes) -> bool:
        """Whether some config reads a target in these bytes of a member."""

    def label_options(self, member: str, text: bytes) -> tuple[str, ...]:
        """The values of ``data.label`` under which some config reads a target in this member, best first."""
        return (member,) if self.is_target(text) else ()

    @abstractmethod
    def encode(self, target: Any) -> dict[str, bytes]:
        """Members by extension that ``parse`` reads as this target."""

    @abstractmethod
    def rows(self, targets: Iterable[Any | None]) -> dict[str, NDArray[Any]]:
        """The target columns of samples, from what ``parse`` returned for each; None: the sample has no target."""

    def has_target(self, targets: Targets) -> NDArray[np.bool_]:
        """[N]: which rows have a target in some column."""
        return np.any([column.has_target(targets[column.name]) for column in self.columns], axis=0)

    @abstractmethod
    def num_invalid(self, targets: Targets) -> int:
        """The number of rows with a target that ``parse`` never returns."""

    def class_ids(self, targets: Targets) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """The classes of rows, for class means and counts: positions of the rows [M] in order, and a class for each;
        those of several class heads are laid end to end, in the order of ``heads``."""
        del targets
        return np.empty(0, np.int64), np.empty(0, np.int32)

    @property
    @abstractmethod
    def widths(self) -> dict[str, int]:
        """Numbers in a row of each output that a network's head returns, by its name; ``MapWidth``: at each of its
        positions."""

    @abstractmethod
    def outputs(self, cache: CacheConfig, widths: Mapping[str, int]) -> tuple[OutputSpec, ...]:
        """What a cache with this config stores for each row; of a task with a ``grid``, for a position of a row.

        Args:
            widths: of a teacher's outputs, by name; an output whose width is unknown is left out.
        """

    def grid(self, stride: int | None) -> int | None:
        """How many pixels of a view, along an axis, a position of the stored logits stands for; None: the logits of the
        task have no positions.

        Args:
            stride: ``cache.grid``; None: the default of the task.
        """
        del stride
        return None

    @property
    def default_logits(self) -> str:
        """``cache.logits`` of a new cache under ``auto``."""
        return "fp16"

    @property
    @abstractmethod
    def roles(self) -> dict[str, str]:
        """The role of each output that this version reads, by its name; a reader ignores the others of a cache.

        The fidelity of encodings is measured by role: ``class``, logits of a softmax; ``map``, such logits at every
        position; ``embedding``, a vector that is compared by its direction. That of outputs with another role is not
        measured.
        """

    @abstractmethod
    def accumulate(self) -> StatisticsAccumulator: ...

    @abstractmethod
    def recount(self, targets: Targets, *, mix_group: int, outputs: Iterable[str]) -> Recount:
        """
        Args:
            targets: of the part's usable rows.
            mix_group: number of neighbouring rows that mix among themselves.
            outputs: names of the stored outputs.
        """

    @abstractmethod
    def teacher_metrics(self, statistics: Statistics) -> dict[str, float | None]:
        """The teacher's quality as shares, by the names in texts, the most informative one first. None: unknown."""

    def teacher_metrics_by_domain(self, statistics: Statistics) -> dict[str, dict[str, float | None]]:
        """``teacher_metrics`` over the rows of each domain, by its name; empty: the samples have no domains."""
        del statistics
        return {}


def planned_outputs(
    task: Task,
    cache: CacheConfig,
    widths: Mapping[str, int],
    *,
    tokens: tuple[int, int] | None,
    size: Size | None = None,
) -> tuple[OutputSpec, ...]:
    """``task.outputs``, of a task with a ``grid`` as maps [K,h,w], and after them the patch tokens, which do not depend
    on the task.

    Args:
        tokens: (P, D); None: unknown, or the teacher computes none.
        size: height and width of the views; None: unknown, and maps have a single position.
    """
    outputs, stride = task.outputs(cache, widths), task.grid(cache.grid)
    if stride is not None:
        grid = (1, 1) if size is None else grid_size(size, stride)
        outputs = tuple(replace(spec, shape=(*spec.shape, *grid)) for spec in outputs)
    return outputs if tokens is None else (*outputs, OutputSpec(TOKENS, tokens, cache.tokens))


def output_roles(task: Task) -> dict[str, str]:
    """``task.roles``, and that of the patch tokens: vectors that are compared by their directions, one by one."""
    return {**task.roles, TOKENS: "tokens"}
