"""Metrics by domain: each metric over the images of each domain, and the lowest value over domains of the main ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.student.distributed import DistributedContext
from pipeline.student.evaluation.metrics.metric_set import EvaluationScope, MetricSet, MetricSums, Outputs, Values
from pipeline.tasks import DOMAIN, Targets, check_num_domains
from schemas.config import DataConfig

WORST_DOMAIN = "worst_domain/"
"""Prefix of the key of a metric's lowest value over domains."""


def metrics_by_domain(metrics: MetricSet) -> MetricSet:
    """These metrics over all images and over those of each domain, and the lowest value over domains of
    ``MetricSet.worst_domain``, as ``worst_domain/KEY``. A row of targets has its domain as text in the column
    ``domain``; None: it is in no domain."""
    worst = [
        replace(
            metrics[key],
            key=WORST_DOMAIN + key,
            title=f"worst-domain {metrics[key].title}",
            needs=(*metrics[key].needs, DOMAIN),
            teacher_key=None,
            gauge=None,
        )
        for key in metrics.worst_domain
    ]

    def build(data: DataConfig, scope: EvaluationScope, device: torch.device) -> MetricSums:
        return DomainSums(lambda: metrics.sums(data, scope, device), metrics.worst_domain)

    return replace(metrics, metrics=(*metrics.metrics, *worst), sums=build)


class DomainSums(MetricSums):
    """Sums over all rows and over those of each domain.

    Args:
        build: builds the empty sums of one domain.
        worst: the keys of the metrics of which the lowest value over domains is a metric too.
    """

    def __init__(self, build: Callable[[], MetricSums], worst: Iterable[str]) -> None:
        self._build, self._worst = build, tuple(worst)
        self._all, self._domains = build(), dict[str, MetricSums]()
        self._num_rows = Counter[str]()
        self._tables: dict[str, dict[str, Any]] = {}

    def add(self, student: Outputs, teacher: Outputs | None, targets: Targets) -> None:
        self._all.add(student, teacher, targets)
        domain_N = targets[DOMAIN]
        for domain in dict.fromkeys(domain_N.tolist()):
            if domain is None:
                continue
            rows = np.flatnonzero(domain_N == domain)
            self._num_rows[domain] += len(rows)
            part = self._domains.setdefault(domain, self._build())
            part.add(
                _rows_of(student, rows),
                None if teacher is None else _rows_of(teacher, rows),
                {name: values_N[rows] for name, values_N in targets.items()},
            )

    def finish(self, distributed: DistributedContext) -> dict[str, float | None]:
        overall, names = self._all.finish(distributed), _over_ranks(self._domains, distributed)
        check_num_domains(len(names))
        self._tables = {
            domain: {
                "num_rows": int(distributed.sum(torch.tensor(self._num_rows[domain], device=distributed.device))),
                **self._domains.setdefault(domain, self._build()).finish(distributed),
            }
            for domain in names
        }
        return {**overall, **{WORST_DOMAIN + key: _lowest(self._tables.values(), key) for key in self._worst}}

    def by_row(self) -> dict[str, Tensor]:
        return self._all.by_row()

    def per_class(self) -> dict[str, list[float | None]]:
        return self._all.per_class()

    def by_domain(self) -> dict[str, Values]:
        return {**self._tables}


def _rows_of(outputs: Outputs, rows: NDArray[np.int64]) -> Outputs:
    return {name: values[rows] for name, values in outputs.items()}


def _over_ranks(names: Iterable[str], distributed: DistributedContext) -> list[str]:
    """The names of all ranks, sorted, on every rank."""
    line = json.dumps(sorted(names)).encode() + b"\n"
    joined = distributed.join(torch.tensor(list(line), dtype=torch.uint8, device=distributed.device))
    return sorted({name for line in bytes(joined.tolist()).splitlines() for name in json.loads(line)})


def _lowest(tables: Iterable[Mapping[str, float | None]], key: str) -> float | None:
    values = (table[key] for table in tables)
    return min((value for value in values if value is not None), default=None)
