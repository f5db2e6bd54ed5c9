"""Several targets a sample (``data.heads``), each a class or a set of classes, and logits for each of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import ConfigError
from pipeline.tasks.class_labels import ClassLabels
from pipeline.tasks.classification import NO_LABEL, TOP1, TOP5
from pipeline.tasks.head_statistics import DECISION_SUMS, HeadsRecount, HeadSums, sums_of
from pipeline.tasks.head_targets import Head, Label, json_object
from pipeline.tasks.task import (
    EMBEDDING,
    BadTargetError,
    OutputSpec,
    TargetColumn,
    Targets,
    Task,
    TaskHead,
)
from schemas.cache_format import Statistics
from schemas.config import CacheConfig, HeadConfig


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
        heads = {name: section.model_dump(mode="json", exclude_defaults=True) for name, section in self.sections}
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

    @property
    def class_names(self) -> Mapping[str | None, tuple[str, ...]]:
        return {head.name: head.labels.names for head in self.entries if head.labels.names}

    def parse(self, texts: Mapping[str, bytes]) -> tuple[Label | None, ...] | None:
        labels = tuple(self._label(head, texts) for head in self.entries)
        return None if all(label is None for label in labels) else labels

    def _label(self, head: Head, texts: Mapping[str, bytes]) -> Label | None:
        if head.member not in texts:
            return None
        value: object = None
        try:
            value = head.find(texts[head.member])
            label = None if value is None else head.label(value)
        except ValueError as error:
            raise _bad_target(head, value) from error
        if label is not None and not head.is_in_range(label):
            raise _bad_target(head, value)
        return label

    def hint(self, error: BadTargetError, samples: Sequence[Mapping[str, bytes]]) -> str:
        labels: set[str] = set()
        for head in self.entries:
            for texts in samples if head.name == error.head else ():
                with suppress(ValueError, KeyError):
                    value = head.find(texts[head.member])
                    labels |= {
                        str(label) for label in (value if isinstance(value, list) else [value]) if label is not None
                    }
            if labels:
                return head.labels.hint(labels, head.num_classes, f"data.heads.{head.name}.")
        return error.next_step

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
            return bool(json_object(text))
        except ValueError:
            return False

    def label_options(self, member: str, text: bytes) -> tuple[str, ...]:
        """The JSON object, or those in it, that have a field with the name of a head."""
        names = {head.name for head in self.entries}
        try:
            document = json_object(text)
        except ValueError:
            return ()
        places = {f"{member}:{key}": value for key, value in document.items() if isinstance(value, dict)}
        return tuple(place for place, value in {member: document, **places}.items() if names & value.keys())

    def encode(self, target: tuple[Label | None, ...]) -> dict[str, bytes]:
        documents: dict[str, Any] = {}
        for head, label in zip(self.entries, target, strict=True):
            if label is None:
                continue
            place = documents.setdefault(head.member, {})
            for key in head.path[:-1]:
                place = place.setdefault(key, {})
            place[head.path[-1]] = head.encoded(label)
        return {member: json.dumps(document).encode() for member, document in documents.items()}

    def rows(self, targets: Iterable[tuple[Label | None, ...] | None]) -> dict[str, NDArray[Any]]:
        nothing: tuple[Label | None, ...] = (None,) * len(self.entries)
        rows = [nothing if target is None else target for target in targets]
        return {head.column: head.rows(row[number] for row in rows) for number, head in enumerate(self.entries)}

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
        if multilabel and cache.logits.startswith(("topk", "sampled")):
            raise ConfigError(
                "topk and sampled are for softmaxes, and the sigmoids of a multilabel head have no common sum",
                code="config.multilabel-topk",
                where="cache.logits",
                got=f"{cache.logits}, and multilabel heads {', '.join(multilabel)}",
                expected="fp32, fp16, int8, int8t, int4 or none",
                next_step="set cache.logits=int8",
            )
        if cache.logits == "head":
            raise ConfigError(
                "logits are computed from the embedding for a single head, and this teacher has several",
                code="config.head-of-several-heads",
                where="cache.logits",
                got=f"{cache.logits}, with data.task: heads",
                expected="fp32, fp16, int8, int8t, int4, topk:k or none",
                next_step="set cache.logits=fp16",
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
            sums = sums_of(head, statistics)
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
    if head.num_classes is None:
        raise ValueError(f"the head {name} has no num_classes")
    labels = ClassLabels.of(head.model_dump())
    return Head(name, head.kind, head.num_classes, member.lower(), fields, labels)


def _bad_target(head: Head, value: object) -> BadTargetError:
    next_step = f"correct the label, data.label or data.heads.{head.name}"
    label = None if value is None else str(value)
    return BadTargetError(head.member, head.expected, next_step=next_step, label=label, head=head.name)
