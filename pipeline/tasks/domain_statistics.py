"""Statistics of a teacher by domain: sums of each domain, and their recount from stored outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, cast
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import ConfigError
from pipeline.tasks.task import DOMAIN, Recount, StatisticsAccumulator, Targets, Task, TeacherOutputs
from schemas.cache_format import Statistics

MAX_DOMAINS = 100
_PREFIX = "domain:"


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
        self._all.add_part(overall_statistics(statistics))
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
        self._all.compare(overall_statistics(stated), expect)
        parts = statistics_by_domain(stated)
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


def overall_statistics(statistics: Statistics) -> Statistics:
    """Those of all rows."""
    sums = {key: value for key, value in statistics.sums.items() if not key.startswith(_PREFIX)}
    return statistics.model_copy(update={"sums": sums})


def statistics_by_domain(statistics: Statistics) -> dict[str, Statistics]:
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
