"""Image classification: a class index per sample, logits [K] and an embedding [D] per view, top-1 and top-5 hits."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.tasks.class_labels import MAX_CLASS, ClassLabels, json_value
from pipeline.tasks.task import (
    EMBEDDING,
    LABEL,
    LOGITS,
    BadTargetError,
    OutputSpec,
    Recount,
    StatisticsAccumulator,
    TargetColumn,
    Targets,
    Task,
    TaskHead,
    TeacherOutputs,
)
from schemas.cache_format import Statistics
from schemas.config import CacheConfig

NO_LABEL = -1
TOP1, TOP5 = "top-1", "top-5"
_HIT_COUNTS = ("labelled", "top1_hits", "top5_hits")
# Of a field that probably has the label; others may have any number, such as a width.
_LABEL_NAME = re.compile(r"(.+\.)?(labels?|cls|class(_(id|idx|name))?|target|category(_id)?|y)", re.IGNORECASE)
# float16 rounding may swap the order of a stored float16 logit and a logit stored in finer steps.
_ROUNDING = 2.0**-10

# int8t takes half of the bytes of fp16 and, from here on, at most a seventh more than int8.
_MANY_CLASSES = 256


def class_ranks(logits_NK: NDArray[np.float32], class_N: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """int64 [N], from 0: the number of larger logits, plus the number of equal logits with a lower class index.

    Each class of a row has a different rank, and class 0 of a row of equal logits has rank 0, as in
    ``predicted_classes``. Functions such as ``torch.topk`` do not define the order of ties.

    Args:
        logits_NK: finite. A NaN is neither larger nor equal, so in a row of NaNs any class would have rank 0.
        class_N: from 0 to K - 1.
    """
    class_N1 = class_N.astype(np.int64)[:, None]
    logit_N1 = np.take_along_axis(logits_NK, class_N1, 1)
    is_lower_NK = np.arange(logits_NK.shape[1]) < class_N1
    return ((logits_NK > logit_N1) | ((logits_NK == logit_N1) & is_lower_NK)).sum(1)


def predicted_classes(logits_NK: NDArray[np.float32]) -> NDArray[np.int64]:
    """int64 [N]: the class of rank 0. NumPy's argmax is documented to return the first of equal values."""
    return logits_NK.argmax(1)


class HitCounter(StatisticsAccumulator):
    """Counts labelled rows, labels by class, and top-1 and top-5 hits of logits."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._classes: Counter[int] = Counter()

    def add(self, outputs: TeacherOutputs, targets: Targets) -> None:
        labelled = targets[LABEL] != NO_LABEL
        rank_M = class_ranks(outputs[LOGITS][labelled], targets[LABEL][labelled])
        self._counts["top1_hits"] += int((rank_M < 1).sum())
        self._counts["top5_hits"] += int((rank_M < 5).sum())
        self.add_labels(targets[LABEL])

    def add_labels(self, label_N: NDArray[np.int32]) -> None:
        """Adds the labels of N rows without hits."""
        label_M = label_N[label_N != NO_LABEL]
        self._counts["labelled"] += len(label_M)
        self._classes.update(label_M.tolist())

    def add_part(self, statistics: Statistics) -> None:
        for name in _HIT_COUNTS:
            self._counts[name] += getattr(statistics, name)
        self._classes.update(statistics.class_counts)

    def result(self) -> dict[str, Any]:
        return {**self._counts, "class_counts": dict(sorted(self._classes.items()))}


class HitRecount(Recount):
    """A mix group counts only if none of its rows is mixed in any view of the part.

    An encoding may turn unequal logits into ties. So hits have two bounds: with all ties lost, and with all ties won.
    For fp32 logits the bounds are equal unless the teacher's own logits tie.
    """

    def __init__(self, label_N: NDArray[np.int32], *, mix_group: int, has_logits: bool) -> None:
        self._has_logits = has_logits
        self._label_N = label_N
        self._group_N = np.arange(len(label_N)) // mix_group
        num_groups = int(self._group_N[-1]) + 1 if len(self._group_N) else 0
        self._mixes_G = np.zeros(num_groups, np.bool_)
        # [G, top-1 or top-5, ties lost or won]
        self._hits_G22 = np.zeros((num_groups, 2, 2), np.int64)
        self._num_rows_N = np.zeros(len(label_N), np.int64)

    def add_view(self, mix_lambda_M: NDArray[np.float32], rows: slice) -> None:
        np.logical_or.at(self._mixes_G, self._group_N[rows], mix_lambda_M != 1)
        self._num_rows_N[rows] += 1

    def add_outputs(self, name: str, values: NDArray[np.float32], rows: slice, *, exact: bool) -> None:
        if name != LOGITS:
            return
        label_M = self._label_N[rows]
        labelled = np.flatnonzero(label_M != NO_LABEL)
        logits_LK, label_L = values[labelled], label_M[labelled].astype(np.int64)
        label_logit_L1 = np.take_along_axis(logits_LK, label_L[:, None], 1)
        margin_L1 = 0 if exact else _ROUNDING * np.abs(logits_LK).max(1, keepdims=True, initial=0)
        max_rank_L = (logits_LK >= label_logit_L1 - margin_L1).sum(1) - 1
        min_rank_L = (logits_LK > label_logit_L1 + margin_L1).sum(1)
        hits_L22 = np.stack([[rank_L < 1, rank_L < 5] for rank_L in (max_rank_L, min_rank_L)]).transpose(2, 1, 0)
        np.add.at(self._hits_G22, self._group_N[rows][labelled], hits_L22.astype(np.int64))

    def compare(self, stated: Statistics, expect: Callable[[str, object, object], object]) -> None:
        counted_N = (self._label_N != NO_LABEL) & ~self._mixes_G[self._group_N]
        classes: Counter[int] = Counter()
        for label, num_rows in zip(
            self._label_N[counted_N].tolist(), self._num_rows_N[counted_N].tolist(), strict=True
        ):
            classes[label] += num_rows
        expected = classes.total(), dict(sorted(classes.items()))
        expect("the commit's class counts do not match the labels", (stated.labelled, stated.class_counts), expected)
        if not self._has_logits:
            return
        bounds_22 = self._hits_G22[~self._mixes_G].sum(0).tolist()
        for name, hits, (low, high) in zip((TOP1, TOP5), (stated.top1_hits, stated.top5_hits), bounds_22, strict=True):
            nearest = min(max(hits, low), high)
            expect(f"the commit's {name} hits do not match the stored logits", hits, nearest)


@dataclass(frozen=True, slots=True)
class Classification(Task):
    """The task of format v1.

    Attributes:
        label: extension of the member with the label, in lower case; for a field of its JSON, with the path after a
            colon; None: no labels are read.
        max_classes: K, if the config has it: a label must be smaller.
        labels: how labels are written.
    """

    label: str | None = "cls"
    max_classes: int | None = None
    labels: ClassLabels = field(default_factory=ClassLabels)

    name = "classification"
    member_content = "a class index or name"
    max_bytes = 2**20
    required_keys = ("data.num_classes",)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Classification:
        label = settings.get("label")
        labels, max_classes = ClassLabels.of(settings), settings.get("num_classes")
        if label is None:
            return cls(None, max_classes, labels)
        member, colon, path = str(label).partition(":")
        return cls(member.lower() + colon + path, max_classes, labels)

    @property
    def settings(self) -> dict[str, Any]:
        return {"label": self.label, "num_classes": self.max_classes, **self.labels.settings}

    @property
    def members(self) -> tuple[str, ...]:
        return () if self.label is None else (self.label.partition(":")[0],)

    @property
    def path(self) -> tuple[str, ...]:
        """Of the label in the JSON of the member; empty: the member has nothing else."""
        path = (self.label or "").partition(":")[2]
        return tuple(path.split(".")) if path else ()

    @property
    def columns(self) -> tuple[TargetColumn, ...]:
        return (TargetColumn(LABEL, pa.int32(), NO_LABEL),)

    @property
    def statistics_fields(self) -> tuple[str, ...]:
        return (*_HIT_COUNTS, "class_counts")

    @property
    def statistics_outputs(self) -> tuple[str, ...]:
        return (LOGITS,)

    @property
    def heads(self) -> tuple[TaskHead, ...]:
        return (TaskHead(None, "class", self.max_classes),)

    @property
    def class_names(self) -> Mapping[str | None, tuple[str, ...]]:
        return {None: self.labels.names} if self.labels.names else {}

    def parse(self, texts: Mapping[str, bytes]) -> int | None:
        for member in self.members:
            if member not in texts:
                continue
            value: object = None
            try:
                value = self._value(texts[member])
                label = None if value is None else self.labels.find(value)
            except ValueError as error:
                raise self._bad_target(member, value) from error
            if label is not None and label > self._largest:
                raise self._bad_target(member, value)
            return label
        return None

    def try_parse(self, texts: Mapping[str, bytes]) -> int | None:
        try:
            values = [self._value(texts[member]) for member in self.members if member in texts]
            return next((self.labels.find(value) for value in values if value is not None), None)
        except ValueError:
            return None

    def _value(self, text: bytes) -> object:
        """What a member holds for the label; None: null in its JSON."""
        if self.path:
            return json_value(text, self.path)
        content = text.decode().strip()
        # A string or null in a JSON member, which may also hold digits that are no JSON, such as 007.
        if self.members[0].endswith("json") and not content.isdigit():
            return json_value(text, ())
        return content

    def _bad_target(self, member: str, value: object) -> BadTargetError:
        where = f", or null, in {'.'.join(self.path)} of a JSON object" if self.path else " as text"
        expected = f"{self.labels.expected(self.max_classes)}{where}"
        next_step = "correct the label, data.num_classes or data.label"
        return BadTargetError(member, expected, next_step=next_step, label=None if value is None else str(value))

    @property
    def _largest(self) -> int:
        return MAX_CLASS if self.max_classes is None else self.max_classes - 1

    def hint(self, error: BadTargetError, samples: Sequence[Mapping[str, bytes]]) -> str:
        texts = [texts[error.member] for texts in samples if error.member in texts]
        fields = () if self.path else self._fields(error.member, texts)
        if fields:
            return f"set {' or '.join(f'data.label={field}' for field in fields)}"
        labels: set[str] = set()
        for text in texts:
            with suppress(ValueError):
                labels.add(str(self._value(text)))
        return self.labels.hint(labels - {"None"}, self.max_classes, "data.") if labels else error.next_step

    def _fields(self, member: str, texts: Sequence[bytes]) -> tuple[str, ...]:
        options = self.label_options(member, texts[0]) if texts else ()
        return tuple(option for option in options if ":" in option)

    def is_target(self, text: bytes) -> bool:
        try:
            return self.labels.find(text.decode()) is not None
        except ValueError:
            return False

    def label_options(self, member: str, text: bytes) -> tuple[str, ...]:
        if self.is_target(text):
            return (member,)
        if not member.endswith("json"):
            return ()
        try:
            fields = dict(_scalars(json_value(text, ())))
        except ValueError:
            return ()
        options = [path for path, value in fields.items() if self.is_target(str(value).encode())]
        named = [path for path in fields if _LABEL_NAME.fullmatch(path)]
        return tuple(f"{member}:{path}" for path in named or options)

    def encode(self, target: int) -> dict[str, bytes]:
        value: Any = self.labels.label(target)
        for key in reversed(self.path):
            value = {key: value}
        texts = {member: json.dumps(value) if member.endswith("json") else str(value) for member in self.members}
        return {member: text.encode() for member, text in texts.items()}

    def rows(self, targets: Iterable[int | None]) -> dict[str, NDArray[Any]]:
        return {LABEL: np.array([NO_LABEL if label is None else label for label in targets], np.int32)}

    def num_invalid(self, targets: Targets) -> int:
        return int(((targets[LABEL] < NO_LABEL) | (targets[LABEL] > self._largest)).sum())

    def class_ids(self, targets: Targets) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        labelled = np.flatnonzero(self.has_target(targets))
        return labelled, targets[LABEL][labelled]

    @property
    def widths(self) -> dict[str, int]:
        return {} if self.max_classes is None else {LOGITS: self.max_classes}

    def outputs(self, cache: CacheConfig, widths: Mapping[str, int]) -> tuple[OutputSpec, ...]:
        kinds = {LOGITS: cache.logits, EMBEDDING: cache.embeddings}
        return tuple(OutputSpec(name, (widths[name],), kind) for name, kind in kinds.items() if name in widths)

    @property
    def default_logits(self) -> str:
        return "int8t" if (self.max_classes or 0) >= _MANY_CLASSES else "fp16"

    @property
    def roles(self) -> dict[str, str]:
        return {LOGITS: "class", EMBEDDING: "embedding"}

    def accumulate(self) -> HitCounter:
        return HitCounter()

    def recount(self, targets: Targets, *, mix_group: int, outputs: Iterable[str]) -> HitRecount:
        return HitRecount(targets[LABEL], mix_group=mix_group, has_logits=LOGITS in outputs)

    def teacher_metrics(self, statistics: Statistics) -> dict[str, float | None]:
        hits = {TOP1: statistics.top1_hits, TOP5: statistics.top5_hits}
        num_rows = statistics.labelled
        return {name: num_hits / num_rows if num_rows else None for name, num_hits in hits.items()}


def _scalars(value: Any, prefix: str = "", depth: int = 2) -> Iterator[tuple[str, object]]:
    """Dotted paths and values of the numbers, texts and nulls in JSON objects."""
    for key, part in value.items() if isinstance(value, dict) else ():
        if isinstance(part, dict) and depth > 1:
            yield from _scalars(part, f"{prefix}{key}.", depth - 1)
        elif part is None or (isinstance(part, int | str) and not isinstance(part, bool)):
            yield f"{prefix}{key}", part
