"""Several targets a sample (``data.heads``), each a class or a set of classes, and logits for each of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.core.errors import ConfigError
from pipeline.tasks.classification import LABEL, LOGITS, NO_LABEL, TOP1, TOP5, HitCounter, HitRecount
from pipeline.tasks.task import (
    EMBEDDING,
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
from schemas.config import CacheConfig, HeadConfig

Label = int | tuple[int, ...]
"""A class, or for a multilabel head its classes in ascending order."""

DECISION_SUMS = ("true_positives", "false_positives")
# Two encodings of a row with 16 or 256 levels move a logit by at most half a step of its range.
_HALF_STEP = 1 / 30
_ROUNDING = 2.0**-10


@dataclass(frozen=True, slots=True)
class BitsColumn(TargetColumn):
    """int8 [N,K], 1 for the classes of a row and ``missing`` in all of a row without a target.

    A row is stored as K bits: class k is bit k mod 8, from the lowest, of byte k div 8. Spare bits are 0.
    """

    num_classes: int = 0

    def to_arrow(self, values_N: NDArray[Any]) -> pa.Array:
        bytes_NB = np.packbits(values_N == 1, axis=1, bitorder="little")
        is_missing_N = values_N[:, 0] == self.missing
        rows = [None if is_missing else row.tobytes() for row, is_missing in zip(bytes_NB, is_missing_N, strict=True)]
        return pa.array(rows, self.type)

    def to_numpy(self, column: pa.ChunkedArray) -> NDArray[Any]:
        is_missing_N = column.is_null().to_numpy()
        data = b"".join(column.fill_null(bytes(self.type.byte_width)).to_pylist())
        bytes_NB = np.frombuffer(data, np.uint8).reshape(-1, self.type.byte_width)
        bits_NK = np.unpackbits(bytes_NB, axis=1, bitorder="little").astype(np.int8)
        values_NK = bits_NK[:, : self.num_classes].copy()
        # A class that does not exist is as invalid as a number out of range.
        values_NK[bits_NK[:, self.num_classes :].any(1)] = 2
        values_NK[is_missing_N] = self.missing
        return values_NK


@dataclass(frozen=True, slots=True)
class Head(TaskHead):
    """One entry of ``data.heads``.

    Attributes:
        member: extension of the member that has the label, in lower case.
        path: of the label in that member's JSON.
    """

    name: str
    num_classes: int
    member: str
    path: tuple[str, ...]

    @property
    def is_multilabel(self) -> bool:
        return self.kind == "multilabel"

    @property
    def target_column(self) -> TargetColumn:
        if not self.is_multilabel:
            return TargetColumn(self.column, pa.int32(), NO_LABEL)
        return BitsColumn(self.column, pa.binary(-(-self.num_classes // 8)), NO_LABEL, self.num_classes)

    @property
    def expected(self) -> str:
        """What the member has, for messages."""
        number = f"an integer in [0, {self.num_classes})"
        content = f"a list of different integers in [0, {self.num_classes})" if self.is_multilabel else number
        return f"{content}, or null, in {'.'.join(self.path)} of a JSON object"

    def find(self, text: bytes) -> Any:
        """What the member holds for this head; None: nothing.

        Raises:
            ValueError: the member is no JSON object.
        """
        value: Any = _json_object(text)
        for key in self.path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def label(self, value: Any) -> Label:
        """
        Raises:
            ValueError: this is no label, under any number of classes.
        """
        if not self.is_multilabel:
            return _class(value)
        if not isinstance(value, list):
            raise ValueError
        classes = tuple(sorted(map(_class, value)))
        if len(set(classes)) < len(classes):
            raise ValueError
        return classes

    def is_in_range(self, label: Label) -> bool:
        return max(label if isinstance(label, tuple) else (label,), default=0) < self.num_classes

    def rows(self, labels: Iterable[Label | None]) -> NDArray[Any]:
        """int32 [N], or int8 [N,K] of a multilabel head."""
        if not self.is_multilabel:
            return np.array([NO_LABEL if label is None else label for label in labels], np.int32)
        listed: list[Any] = list(labels)
        values_NK = np.zeros((len(listed), self.num_classes), np.int8)
        for row, classes in enumerate(listed):
            if classes is None:
                values_NK[row] = NO_LABEL
            else:
                # A head of a shard's first bytes may have classes that the config does not allow.
                values_NK[row, [k for k in classes if k < self.num_classes]] = 1
        return values_NK

    def is_labelled(self, targets: Targets) -> NDArray[np.bool_]:
        values = targets[self.column]
        return (values[:, 0] if self.is_multilabel else values) != NO_LABEL

    def num_invalid(self, targets: Targets) -> int:
        values = targets[self.column]
        if not self.is_multilabel:
            return int(((values < NO_LABEL) | (values >= self.num_classes)).sum())
        is_bit_NK = (values == 0) | (values == 1)
        return int((~(is_bit_NK.all(1) | (values == NO_LABEL).all(1))).sum())


def _class(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError
    return value


def _json_object(text: bytes) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


class HeadSums(StatisticsAccumulator):
    """``HEAD/NAME`` in ``Statistics.sums``: the counts of classification for each class head; for a multilabel head its
    labelled rows, its labels by class, and its right and wrong positive decisions (logit above 0)."""

    def __init__(self, heads: tuple[Head, ...]) -> None:
        self._heads, self._sums = heads, Counter[str]()

    def add(self, outputs: TeacherOutputs, targets: Targets) -> None:
        for head in self._heads:
            if head.output in outputs:
                counts = _decisions if head.is_multilabel else _hits
                self._sums.update({f"{head.name}/{key}": n for key, n in counts(head, outputs, targets).items()})

    def add_part(self, statistics: Statistics) -> None:
        self._sums.update({key: int(value) for key, value in statistics.sums.items()})

    def result(self) -> dict[str, Any]:
        return {"sums": {key: float(self._sums[key]) for key in sorted(self._sums)}}


def _hits(head: Head, outputs: TeacherOutputs, targets: Targets) -> dict[str, int]:
    counter = HitCounter()
    counter.add({LOGITS: outputs[head.output]}, {LABEL: targets[head.column]})
    counts = counter.result()
    classes = counts.pop("class_counts")
    return counts | {f"classes/{label}": num_rows for label, num_rows in classes.items()}


def _decisions(head: Head, outputs: TeacherOutputs, targets: Targets) -> dict[str, int]:
    labelled_N = head.is_labelled(targets)
    is_set_MK, is_positive_MK = targets[head.column][labelled_N] == 1, outputs[head.output][labelled_N] > 0
    return _label_counts(is_set_MK, np.ones(len(is_set_MK), np.int64)) | {
        "true_positives": int((is_set_MK & is_positive_MK).sum()),
        "false_positives": int((~is_set_MK & is_positive_MK).sum()),
    }


def _label_counts(is_set_MK: NDArray[np.bool_], num_rows_M: NDArray[np.int64]) -> dict[str, int]:
    counts_K = (is_set_MK * num_rows_M[:, None]).sum(0).tolist()
    return {"labelled": int(num_rows_M.sum())} | {f"classes/{label}": n for label, n in enumerate(counts_K) if n}


class DecisionRecount:
    """As ``HitRecount``, for a multilabel head: a mix group counts only if none of its rows is mixed."""

    def __init__(self, target_NK: NDArray[np.int8], *, mix_group: int, has_logits: bool) -> None:
        self._target_NK, self._has_logits = target_NK, has_logits
        self._group_N = np.arange(len(target_NK)) // mix_group
        num_groups = int(self._group_N[-1]) + 1 if len(self._group_N) else 0
        self._mixes_G = np.zeros(num_groups, np.bool_)
        # [G, true or false positives, all doubtful decisions negative or positive]
        self._counts_G22 = np.zeros((num_groups, 2, 2), np.int64)
        self._num_rows_N = np.zeros(len(target_NK), np.int64)

    def add_view(self, mix_lambda_M: NDArray[np.float32], rows: slice) -> None:
        np.logical_or.at(self._mixes_G, self._group_N[rows], mix_lambda_M != 1)
        self._num_rows_N[rows] += 1

    def add_logits(self, values: NDArray[np.float32], rows: slice, *, exact: bool) -> None:
        target_MK = self._target_NK[rows]
        labelled = np.flatnonzero(target_MK[:, 0] != NO_LABEL)
        logits_LK, is_set_LK = values[labelled], target_MK[labelled] == 1
        range_L1 = np.ptp(logits_LK, axis=1, keepdims=True) if len(labelled) else np.zeros((0, 1), np.float32)
        margin_L1 = (
            0 if exact else _HALF_STEP * range_L1 + _ROUNDING * np.abs(logits_LK).max(1, keepdims=True, initial=0)
        )
        # A small logit of either sign may be stored as 0.
        for bound, is_positive_LK in enumerate((logits_LK > margin_L1, logits_LK >= -margin_L1)):
            counts_L2 = np.stack([(is_set_LK & is_positive_LK).sum(1), (~is_set_LK & is_positive_LK).sum(1)], 1)
            np.add.at(self._counts_G22[:, :, bound], self._group_N[rows][labelled], counts_L2)

    def compare(self, name: str, stated: Mapping[str, int], expect: Callable[[str, object, object], object]) -> None:
        counted_N = (self._target_NK[:, 0] != NO_LABEL) & ~self._mixes_G[self._group_N]
        expected = _label_counts(self._target_NK[counted_N] == 1, self._num_rows_N[counted_N])
        got = {key: n for key, n in stated.items() if key not in DECISION_SUMS}
        expect(f"the commit's class counts of the head {name} do not match the labels", got, expected)
        if self._has_logits:
            bounds_22 = self._counts_G22[~self._mixes_G].sum(0).tolist()
            for key, (low, high) in zip(DECISION_SUMS, bounds_22, strict=True):
                count = stated.get(key, 0)
                nearest = min(max(count, low), high)
                expect(f"the commit's {key} of the head {name} do not match the stored logits", count, nearest)


class HeadsRecount(Recount):
    """The recounts of all heads whose logits the teacher has."""

    def __init__(self, heads: tuple[Head, ...], targets: Targets, *, mix_group: int, outputs: Iterable[str]) -> None:
        stored = set(outputs)
        self._hits: dict[str, tuple[Head, HitRecount]] = {}
        self._decisions: dict[str, tuple[Head, DecisionRecount]] = {}
        for head in heads:
            has_logits = head.output in stored
            if head.is_multilabel:
                counts = DecisionRecount(targets[head.column], mix_group=mix_group, has_logits=has_logits)
                self._decisions[head.output] = head, counts
            else:
                hits = HitRecount(targets[head.column], mix_group=mix_group, has_logits=has_logits)
                self._hits[head.output] = head, hits

    def add_view(self, mix_lambda_M: NDArray[np.float32], rows: slice) -> None:
        for _, recount in (*self._hits.values(), *self._decisions.values()):
            recount.add_view(mix_lambda_M, rows)

    def add_outputs(self, name: str, values: NDArray[np.float32], rows: slice, *, exact: bool) -> None:
        if name in self._hits:
            self._hits[name][1].add_outputs(LOGITS, values, rows, exact=exact)
        if name in self._decisions:
            self._decisions[name][1].add_logits(values, rows, exact=exact)

    def compare(self, stated: Statistics, expect: Callable[[str, object, object], object]) -> None:
        for head, hits in self._hits.values():
            if sums := _sums_of(head, stated):
                hits.compare(_as_classification(sums), _of_head(head, expect))
        for head, decisions in self._decisions.values():
            if sums := _sums_of(head, stated):
                decisions.compare(head.name, sums, expect)


def _sums_of(head: Head, statistics: Statistics) -> dict[str, int]:
    prefix = f"{head.name}/"
    return {key.removeprefix(prefix): int(n) for key, n in statistics.sums.items() if key.startswith(prefix)}


def _as_classification(sums: Mapping[str, int]) -> Statistics:
    classes = {int(key.removeprefix("classes/")): n for key, n in sums.items() if key.startswith("classes/")}
    labelled, top1_hits, top5_hits = (sums.get(key, 0) for key in ("labelled", "top1_hits", "top5_hits"))
    class_counts = dict(sorted(classes.items()))
    return Statistics(labelled=labelled, top1_hits=top1_hits, top5_hits=top5_hits, class_counts=class_counts)


def _of_head(head: Head, expect: Callable[[str, object, object], object]) -> Callable[[str, object, object], object]:
    return lambda what, got, expected: expect(f"head {head.name}: {what}", got, expected)


@dataclass(frozen=True, slots=True)
class Heads(Task):
    """Named targets; a label may be missing in any of them. Columns and outputs are in the order of the names.

    Attributes:
        label: member that the heads read, with the path of an object in its JSON after a colon.
    """

    entries: tuple[Head, ...]
    label: str | None
    sections: tuple[tuple[str, HeadConfig], ...]

    name = "heads"
    member_content = "the labels of its heads"
    max_bytes = 2**20
    required_keys = ("data.heads",)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Heads:
        label = settings.get("label")
        # By name: the JSON of settings and headers has no other order.
        sections = {name: HeadConfig.model_validate(dict(head)) for name, head in sorted(settings["heads"].items())}
        heads = tuple(_head(name, head, label) for name, head in sections.items())
        return cls(heads, label, tuple(sections.items()))

    @property
    def settings(self) -> dict[str, Any]:
        heads = {name: section.model_dump(exclude_defaults=True) for name, section in self.sections}
        return {"label": self.label, "heads": heads}

    @property
    def members(self) -> tuple[str, ...]:
        return () if self.label is None else tuple(dict.fromkeys(head.member for head in self.entries))

    @property
    def columns(self) -> tuple[TargetColumn, ...]:
        return tuple(head.target_column for head in self.entries)

    @property
    def statistics_fields(self) -> tuple[str, ...]:
        return ("sums",)

    @property
    def statistics_outputs(self) -> tuple[str, ...]:
        return tuple(head.output for head in self.entries)

    @property
    def heads(self) -> tuple[TaskHead, ...]:
        return self.entries

    def parse(self, texts: Mapping[str, bytes]) -> tuple[Label | None, ...] | None:
        labels = tuple(self._label(head, texts) for head in self.entries)
        return None if all(label is None for label in labels) else labels

    def _label(self, head: Head, texts: Mapping[str, bytes]) -> Label | None:
        if head.member not in texts:
            return None
        try:
            value = head.find(texts[head.member])
            label = None if value is None else head.label(value)
        except ValueError as error:
            raise _bad_target(head) from error
        if label is not None and not head.is_in_range(label):
            raise _bad_target(head)
        return label

    def try_parse(self, texts: Mapping[str, bytes]) -> tuple[Label | None, ...] | None:
        labels: list[Label | None] = []
        for head in self.entries:
            try:
                value = head.find(texts[head.member]) if head.member in texts else None
                labels.append(None if value is None else head.label(value))
            except ValueError:
                return None
        return None if all(label is None for label in labels) else tuple(labels)

    def is_target(self, text: bytes) -> bool:
        try:
            return bool(_json_object(text))
        except ValueError:
            return False

    def encode(self, target: tuple[Label | None, ...]) -> dict[str, bytes]:
        documents: dict[str, Any] = {}
        for head, label in zip(self.entries, target, strict=True):
            if label is None:
                continue
            place = documents.setdefault(head.member, {})
            for key in head.path[:-1]:
                place = place.setdefault(key, {})
            place[head.path[-1]] = list(label) if isinstance(label, tuple) else label
        return {member: json.dumps(document).encode() for member, document in documents.items()}

    def rows(self, targets: Iterable[tuple[Label | None, ...] | None]) -> dict[str, NDArray[Any]]:
        nothing: tuple[Label | None, ...] = (None,) * len(self.entries)
        rows = [nothing if target is None else target for target in targets]
        return {head.column: head.rows(row[number] for row in rows) for number, head in enumerate(self.entries)}

    def has_target(self, targets: Targets) -> NDArray[np.bool_]:
        return np.any([column.has_target(targets[column.name]) for column in self.columns], axis=0)

    def num_invalid(self, targets: Targets) -> int:
        return sum(head.num_invalid(targets) for head in self.entries)

    def class_ids(self, targets: Targets) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """The classes of the class heads, laid end to end in that order."""
        heads = [head for head in self.entries if not head.is_multilabel]
        if not heads:
            return Task.class_ids(self, targets)
        labels_NH = np.stack([targets[head.column] for head in heads], axis=1)
        starts_H = np.array([self.class_range(head).start for head in heads])
        rows, numbers = np.nonzero(labels_NH != NO_LABEL)
        return rows, (labels_NH[rows, numbers] + starts_H[numbers]).astype(np.int32)

    @property
    def widths(self) -> dict[str, int]:
        return {head.output: head.num_classes for head in self.entries}

    def outputs(self, cache: CacheConfig, widths: Mapping[str, int]) -> tuple[OutputSpec, ...]:
        multilabel = [head.name for head in self.entries if head.is_multilabel and head.output in widths]
        if multilabel and cache.logits.startswith("topk"):
            raise ConfigError(
                "topk stores the largest classes of a softmax, and the sigmoids of a multilabel head have none",
                code="config.multilabel-topk",
                where="cache.logits",
                got=f"{cache.logits}, and multilabel heads {', '.join(multilabel)}",
                expected="fp32, fp16, int8, int4 or none",
                next_step="set cache.logits=int8",
            )
        kinds = {head.output: cache.logits for head in self.entries} | {EMBEDDING: cache.embeddings}
        return tuple(OutputSpec(name, (widths[name],), kind) for name, kind in kinds.items() if name in widths)

    @property
    def roles(self) -> dict[str, str]:
        roles = {head.output: "multilabel" if head.is_multilabel else "class" for head in self.entries}
        return roles | {EMBEDDING: "embedding"}

    def accumulate(self) -> HeadSums:
        return HeadSums(self.entries)

    def recount(self, targets: Targets, *, mix_group: int, outputs: Iterable[str]) -> HeadsRecount:
        return HeadsRecount(self.entries, targets, mix_group=mix_group, outputs=outputs)

    def teacher_metrics(self, statistics: Statistics) -> dict[str, float | None]:
        metrics: dict[str, float | None] = {}
        for head in self.entries:
            sums = _sums_of(head, statistics)
            if head.is_multilabel:
                positives = sum(n for key, n in sums.items() if key.startswith("classes/"))
                decided = positives + sum(sums.get(key, 0) for key in DECISION_SUMS)
                metrics[f"{head.name} micro F1"] = 2 * sums.get("true_positives", 0) / decided if decided else None
                continue
            labelled = sums.get("labelled", 0)
            for title, key in ((TOP1, "top1_hits"), (TOP5, "top5_hits")):
                if title == TOP1 or head.num_classes > 5:
                    metrics[f"{head.name} {title}"] = sums.get(key, 0) / labelled if labelled else None
        return metrics


def _head(name: str, head: HeadConfig, label: str | None) -> Head:
    """
    Raises:
        ValueError: the head cannot be read from such a member.
    """
    member, _, path = (label or "json").partition(":")
    is_json = bool(path) or member.lower().endswith("json")
    if not is_json:
        raise ValueError(f"heads read fields of a JSON member, and data.label is {label}; expected json or json:FIELD")
    fields = (*path.split("."), name) if path else (name,)
    return Head(name, head.kind, head.num_classes, member.lower(), fields)


def _bad_target(head: Head) -> BadTargetError:
    next_step = f"correct the label, data.label or data.heads.{head.name}"
    return BadTargetError(head.member, head.expected, next_step=next_step)
