"""The domain of each sample, such as its camera or site: a column next to the targets of a task, and statistics by
domain. A domain is no target: no loss reads it, and a sample may have none.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import Any, cast
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.core.errors import ConfigError
from pipeline.tasks.task import (
    DOMAIN,
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

MAX_DOMAINS = 100
_MAX_BYTES = 2**20
_MAX_CHARACTERS = 256
_PREFIX = "domain:"


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
            return _domain(self._value(text))
        except ValueError as error:
            place = f"{'.'.join(self.path)} of a JSON object" if self.path else "UTF-8"
            expected = f"a text of at most {_MAX_CHARACTERS} characters, an integer or null, as {place}"
            next_step = "correct the member or data.domain"
            raise BadTargetError(self.member, expected, next_step=next_step, what="domain") from error

    def _value(self, text: bytes) -> Any:
        if not self.path:
            return text.decode()
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError
        for key in self.path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

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
    trains_on_targets = cast("bool", property(attrgetter("base.trains_on_targets")))
    embedding = cast("str", property(attrgetter("base.embedding")))

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

    @property
    def roles(self) -> dict[str, str]:
        return self.base.roles

    def accumulate(self) -> DomainAccumulator:
        return DomainAccumulator(self.base)

    def recount(self, targets: Targets, *, mix_group: int, outputs: Iterable[str]) -> DomainRecount:
        return DomainRecount(self.base, targets, mix_group=mix_group, outputs=[*outputs])

    def teacher_metrics(self, statistics: Statistics) -> dict[str, float | None]:
        return self.base.teacher_metrics(_overall(statistics))

    def teacher_metrics_by_domain(self, statistics: Statistics) -> dict[str, dict[str, float | None]]:
        parts = _by_domain(statistics)
        return {domain: self.base.teacher_metrics(parts[domain]) for domain in sorted(parts)}


def with_domain(task: Task, setting: str | Mapping[str, str]) -> WithDomain:
    """The task with domains that ``data.domain`` finds."""
    stored = setting if isinstance(setting, str) else tuple(sorted(setting.items()))
    return WithDomain(task, DomainSource.of(setting), stored)


def without_domain(targets: Targets) -> dict[str, NDArray[Any]]:
    """The columns that losses may read."""
    return {name: values for name, values in targets.items() if name != DOMAIN}


def check_num_domains(num_domains: int) -> None:
    """
    Raises:
        ConfigError: there are more domains than statistics and metrics hold.
    """
    if num_domains > MAX_DOMAINS:
        raise ConfigError(
            "the samples have too many domains",
            code="data.too-many-domains",
            where="data.domain",
            got=f"more than {MAX_DOMAINS}",
            expected="a few groups of samples, such as cameras or sites",
            next_step="name a field with fewer values in data.domain",
        )


def _pair(target: Any | None, domain: str | None) -> tuple[Any | None, str | None] | None:
    return None if target is None and domain is None else (target, domain)


class DomainAccumulator(StatisticsAccumulator):
    """The statistics of a task, and in ``Statistics.sums`` those of the rows of each domain: ``domain:NAME/FIELD``,
    with the name percent-encoded; ``domain:NAME/FIELD/KEY`` for fields that are counts by key."""

    def __init__(self, base: Task) -> None:
        self._base, self._all = base, base.accumulate()
        self._domains: dict[str, StatisticsAccumulator] = {}
        self._added = Counter[str]()

    def add(self, outputs: TeacherOutputs, targets: Targets) -> None:
        self._all.add(outputs, targets)
        domain_N = targets[DOMAIN]
        for domain in dict.fromkeys(domain_N.tolist()):
            if domain is None:
                continue
            rows = np.flatnonzero(domain_N == domain)
            self._domains.setdefault(domain, self._base.accumulate()).add(
                {name: values_N[rows] for name, values_N in outputs.items()},
                {name: values_N[rows] for name, values_N in targets.items()},
            )
        check_num_domains(len(self._domains))

    def add_part(self, statistics: Statistics) -> None:
        self._all.add_part(_overall(statistics))
        self._added.update({key: int(value) for key, value in statistics.sums.items() if key.startswith(_PREFIX)})

    def result(self) -> dict[str, Any]:
        overall, sums = self._all.result(), Counter(self._added)
        for domain, accumulator in self._domains.items():
            fields = _flat(accumulator.result())
            sums.update({f"{_PREFIX}{quote(domain, safe='')}/{key}": int(value) for key, value in fields.items()})
        return {**overall, "sums": {**overall.get("sums", {}), **{key: float(sums[key]) for key in sorted(sums)}}}


class DomainRecount(Recount):
    """The recount of all rows and of each domain, in which rows of other domains have no target."""

    def __init__(self, base: Task, targets: Targets, *, mix_group: int, outputs: list[str]) -> None:
        self._all = base.recount(targets, mix_group=mix_group, outputs=outputs)
        domain_N = targets[DOMAIN]
        self._domains: dict[str, Recount] = {}
        for domain in sorted({name for name in domain_N.tolist() if name is not None}):
            columns = {column.name: targets[column.name].copy() for column in base.columns}
            for column in base.columns:
                columns[column.name][domain_N != domain] = column.missing
            self._domains[domain] = base.recount(columns, mix_group=mix_group, outputs=outputs)

    def add_view(self, mix_lambda_M: NDArray[np.float32], rows: slice) -> None:
        for recount in (self._all, *self._domains.values()):
            recount.add_view(mix_lambda_M, rows)

    def add_outputs(self, name: str, values: NDArray[np.float32], rows: slice, *, exact: bool) -> None:
        for recount in (self._all, *self._domains.values()):
            recount.add_outputs(name, values, rows, exact=exact)

    def compare(self, stated: Statistics, expect: Callable[[str, object, object], object]) -> None:
        self._all.compare(_overall(stated), expect)
        parts = _by_domain(stated)
        expect("the commit has statistics of domains that its index lacks", sorted(parts.keys() - self._domains), [])
        for domain, recount in self._domains.items():
            recount.compare(parts.get(domain, Statistics()), _of_domain(domain, expect))


def _of_domain(domain: str, expect: Callable[[str, object, object], object]) -> Callable[[str, object, object], object]:
    return lambda what, got, expected: expect(f"domain {domain}: {what}", got, expected)


def _flat(fields: Mapping[str, Any]) -> dict[str, float]:
    """Fields of ``Statistics`` by name; the sums by their keys, other counts as ``FIELD/KEY``."""
    flat: dict[str, float] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            counts = cast("Mapping[str, float]", value)
            flat |= {key if name == "sums" else f"{name}/{key}": number for key, number in counts.items()}
        else:
            flat[name] = value
    return flat


def _overall(statistics: Statistics) -> Statistics:
    """Those of all rows."""
    sums = {key: value for key, value in statistics.sums.items() if not key.startswith(_PREFIX)}
    return statistics.model_copy(update={"sums": sums})


def _by_domain(statistics: Statistics) -> dict[str, Statistics]:
    """The inverse of ``_flat``."""
    parts: dict[str, dict[str, Any]] = {}
    for key, value in statistics.sums.items():
        if not key.startswith(_PREFIX):
            continue
        domain, _, field = key.removeprefix(_PREFIX).partition("/")
        fields = parts.setdefault(unquote(domain), {"sums": {}})
        name, _, subkey = field.partition("/")
        if field in Statistics.model_fields:
            fields[field] = int(value)
        elif name in Statistics.model_fields:
            fields.setdefault(name, {})[subkey] = int(value)
        else:
            fields["sums"][field] = value
    return {domain: Statistics.model_validate(fields) for domain, fields in parts.items()}
