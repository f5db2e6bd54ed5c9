"""The domain of each sample, such as its camera or site: a column next to the targets of a task, and statistics by
domain. A domain is no target: no loss reads it, and a sample may have none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.tasks.class_labels import json_value
from pipeline.tasks.domain_statistics import (
    DomainAccumulator,
    DomainRecount,
    overall_statistics,
    statistics_by_domain,
)
from pipeline.tasks.task import (
    DOMAIN,
    BadTargetError,
    OutputSpec,
    TargetColumn,
    TargetMember,
    Targets,
    Task,
    TaskHead,
)
from schemas.cache_format import Statistics
from schemas.config import CacheConfig

_MAX_BYTES = 2**20
_MAX_CHARACTERS = 256


class DomainColumn(TargetColumn):
    """Texts: an object array, with None for a sample without a domain."""

    def to_numpy(self, column: pa.ChunkedArray) -> NDArray[Any]:
        encoded = column.combine_chunks().dictionary_encode()
        # One object for each domain, not for each row.
        names = np.array([*encoded.dictionary.to_pylist(), None], object)
        return names[encoded.indices.fill_null(len(names) - 1).to_numpy()]


@dataclass(frozen=True, slots=True)
class DomainSource:
    """Where ``data.domain`` finds the domain of a sample.

    Attributes:
        member: extension of a member, in lower case; None: the domain is that of the shard.
        path: of a text or an integer in that member's JSON; empty: the member is the text.
        by_shard: domains by shard id or glob, the most specific one first.
    """

    member: str | None
    path: tuple[str, ...] = ()
    by_shard: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, setting: str | Mapping[str, str]) -> DomainSource:
        if not isinstance(setting, str):
            return cls(None, by_shard=tuple(sorted(setting.items(), key=lambda item: _specificity(item[0]))))
        member, _, path = setting.partition(":")
        return cls(member.lower(), tuple(path.split(".")) if path else ())

    def of_shard(self, shard_id: str) -> str | None:
        return next((domain for pattern, domain in self.by_shard if fnmatchcase(shard_id, pattern)), None)

    def parse(self, texts: Mapping[str, bytes]) -> str | None:
        """
        Raises:
            BadTargetError: the member has no text or integer in this place.
        """
        text = None if self.member is None else texts.get(self.member)
        if self.member is None or text is None:
            return None
        try:
            return _domain(json_value(text, self.path) if self.path else text.decode())
        except ValueError as error:
            place = f"{'.'.join(self.path)} of a JSON object" if self.path else "UTF-8"
            expected = f"a text of at most {_MAX_CHARACTERS} characters, an integer or null, as {place}"
            next_step = "correct the member or data.domain"
            raise BadTargetError(self.member, expected, next_step=next_step, what="domain") from error

    def encode(self, domain: str, members: Mapping[str, bytes]) -> dict[str, bytes]:
        """These members and the one that ``parse`` reads as this domain; empty for that of a shard."""
        if self.member is None:
            return dict(members)
        if not self.path:
            return {**members, self.member: domain.encode()}
        document = json.loads(members.get(self.member, b"{}"))
        place = document
        for key in self.path[:-1]:
            place = place.setdefault(key, {})
        place[self.path[-1]] = domain
        return {**members, self.member: json.dumps(document).encode()}


def _specificity(pattern: str) -> tuple[bool, int, str]:
    """Sorts ids before globs, and long globs before short ones."""
    return any(sign in pattern for sign in "*?["), -len(pattern), pattern


def _domain(value: Any) -> str | None:
    """
    Raises:
        ValueError: this is no domain.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError
    text = str(value).strip()
    if len(text) > _MAX_CHARACTERS:
        raise ValueError
    return text or None


@dataclass(frozen=True)
class WithDomain(Task):
    """A task whose samples have domains. Everything else is that of ``base``.

    Attributes:
        source: of a domain.
        setting: ``data.domain``.
        shard_domain: the domain of all samples of a shard, if shards have one; see ``of_shard``.
    """

    base: Task
    source: DomainSource
    setting: str | tuple[tuple[str, str], ...]
    shard_domain: str | None = None

    name = cast("str", property(attrgetter("base.name")))
    member_content = cast("str", property(attrgetter("base.member_content")))
    max_bytes = _MAX_BYTES
    required_keys = cast("tuple[str, ...]", property(attrgetter("base.required_keys")))
    has_networks = cast("bool", property(attrgetter("base.has_networks")))
    default_member = cast("str", property(attrgetter("base.default_member")))
    trains_on_targets = cast("bool", property(attrgetter("base.trains_on_targets")))
    view_target = cast("str | None", property(attrgetter("base.view_target")))
    embedding = cast("str | None", property(attrgetter("base.embedding")))

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> WithDomain:
        raise TypeError(f"with_domain builds it from another task, not from {settings}")

    def of_shard(self, shard_id: str) -> WithDomain:
        return replace(self, shard_domain=self.source.of_shard(shard_id))

    @property
    def settings(self) -> dict[str, Any]:
        setting = self.setting if isinstance(self.setting, str) else dict(self.setting)
        return {**self.base.settings, DOMAIN: setting}

    @property
    def members(self) -> tuple[str, ...]:
        return self.base.members

    @property
    def read_members(self) -> tuple[str, ...]:
        own = () if self.source.member is None else (self.source.member,)
        return tuple(dict.fromkeys((*self.base.read_members, *own)))

    @property
    def columns(self) -> tuple[TargetColumn, ...]:
        return (*self.base.columns, DomainColumn(DOMAIN, pa.string(), None))

    @property
    def statistics_fields(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.base.statistics_fields, "sums")))

    @property
    def statistics_outputs(self) -> tuple[str, ...]:
        return self.base.statistics_outputs

    @property
    def heads(self) -> tuple[TaskHead, ...]:
        return self.base.heads

    @property
    def class_names(self) -> Mapping[str | None, tuple[str, ...]]:
        return self.base.class_names

    @property
    def num_classes(self) -> int:
        return self.base.num_classes

    def class_range(self, head: TaskHead) -> slice:
        return self.base.class_range(head)

    def parse(self, texts: Mapping[str, bytes]) -> tuple[Any | None, str | None] | None:
        return _pair(self.base.parse(self._of_base(texts)), self.source.parse(texts))

    def parse_members(self, members: Mapping[str, TargetMember]) -> tuple[Any | None, str | None] | None:
        texts = {name: member.data for name, member in members.items()}
        of_base = {name: members[name]._replace(data=text) for name, text in self._of_base(texts).items()}
        return _pair(self.base.parse_members(of_base), self.source.parse(texts))

    def check_target(self, target: tuple[Any | None, str | None] | None, width: int, height: int) -> str | None:
        return self.base.check_target(None if target is None else target[0], width, height)

    def target_data(self, target: tuple[Any | None, str | None] | None) -> bytes | None:
        return None if target is None else self.base.target_data(target[0])

    def decode_target(self, data: bytes) -> Any:
        return self.base.decode_target(data)

    def target_of_view(self, target: Any | None, box: Sequence[int], flip: bool, size: tuple[int, int]) -> NDArray[Any]:
        return self.base.target_of_view(target, box, flip, size)

    def without_content(self, target: tuple[Any | None, str | None] | None) -> tuple[Any | None, str | None] | None:
        return None if target is None else (self.base.without_content(target[0]), target[1])

    def try_parse(self, texts: Mapping[str, bytes]) -> tuple[Any | None, str | None] | None:
        try:
            domain = self.source.parse(texts)
        except BadTargetError:
            domain = None
        return _pair(self.base.try_parse(self._of_base(texts)), domain)

    def hint(self, error: BadTargetError, samples: Sequence[Mapping[str, bytes]]) -> str:
        return error.next_step if error.what == DOMAIN else self.base.hint(error, [*map(self._of_base, samples)])

    def label_options(self, member: str, text: bytes) -> tuple[str, ...]:
        return self.base.label_options(member, text)

    def _of_base(self, texts: Mapping[str, bytes]) -> dict[str, bytes]:
        read, limit = self.base.read_members, self.base.max_bytes
        return {name: text if len(text) <= limit else b"" for name, text in texts.items() if name in read}

    def is_target(self, text: bytes) -> bool:
        return len(text) <= self.base.max_bytes and self.base.is_target(text)

    def encode(self, target: tuple[Any | None, str | None]) -> dict[str, bytes]:
        base, domain = target
        members = {} if base is None else self.base.encode(base)
        return members if domain is None else self.source.encode(domain, members)

    def rows(self, targets: Iterable[tuple[Any | None, str | None] | None]) -> dict[str, NDArray[Any]]:
        pairs = [(None, None) if target is None else target for target in targets]
        domains = np.empty(len(pairs), object)
        domains[:] = [self.shard_domain if domain is None else domain for _, domain in pairs]
        return {**self.base.rows(base for base, _ in pairs), DOMAIN: domains}

    def has_target(self, targets: Targets) -> NDArray[np.bool_]:
        return self.base.has_target(targets)

    def num_invalid(self, targets: Targets) -> int:
        return self.base.num_invalid(targets)

    def class_ids(self, targets: Targets) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        return self.base.class_ids(targets)

    @property
    def widths(self) -> dict[str, int]:
        return self.base.widths

    def outputs(self, cache: CacheConfig, widths: Mapping[str, int]) -> tuple[OutputSpec, ...]:
        return self.base.outputs(cache, widths)

    def grid(self, stride: int | None) -> int | None:
        return self.base.grid(stride)

    @property
    def default_logits(self) -> str:
        return self.base.default_logits

    @property
    def roles(self) -> dict[str, str]:
        return self.base.roles

    def accumulate(self) -> DomainAccumulator:
        return DomainAccumulator(self.base)

    def recount(self, targets: Targets, *, mix_group: int, outputs: Iterable[str]) -> DomainRecount:
        return DomainRecount(self.base, targets, mix_group=mix_group, outputs=[*outputs])

    def teacher_metrics(self, statistics: Statistics) -> dict[str, float | None]:
        return self.base.teacher_metrics(overall_statistics(statistics))

    def teacher_metrics_by_domain(self, statistics: Statistics) -> dict[str, dict[str, float | None]]:
        parts = statistics_by_domain(statistics)
        by_domain = {domain: self.base.teacher_metrics(parts[domain]) for domain in sorted(parts)}
        # Without labels to be right about, a teacher has no metrics.
        return {domain: metrics for domain, metrics in by_domain.items() if metrics}


def with_domain(task: Task, setting: str | Mapping[str, str]) -> WithDomain:
    """The task with domains that ``data.domain`` finds."""
    stored = setting if isinstance(setting, str) else tuple(sorted(setting.items()))
    return WithDomain(task, DomainSource.of(setting), stored)


def without_domain(targets: Targets) -> dict[str, NDArray[Any]]:
    """The columns that losses may read."""
    return {name: values for name, values in targets.items() if name != DOMAIN}


def _pair(target: Any | None, domain: str | None) -> tuple[Any | None, str | None] | None:
    return None if target is None and domain is None else (target, domain)
