"""The fold of commits: the totals and the tables of a manifest, from one commit after another."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.cache.build.statistics import StatisticsFold
from pipeline.core.hashing import canonical_json
from pipeline.tasks import Task
from schemas.cache_format import Commit, ViewBlock

# Rows of the table of parts that are Python objects at one time, before they become columns.
ROWS_PER_BATCH = 100_000


@dataclass(frozen=True, slots=True)
class Fold:
    """The part of a manifest that its commits decide: its totals by key, and its two tables without shard paths."""

    totals: dict[str, Any]
    shards: pa.Table
    parts: pa.Table


def fold_commits(commits: Iterable[Commit], shard_ids: Collection[str], task: Task) -> Fold:
    """Folds the commits of these shards, in the order of their paths. The result has the shards in the given order.

    No commit stays in memory: a cache may have more of them than fit. ``num_views`` is 0 if a shard lacks view 0.
    """
    by_shard: dict[str, _Shard] = {}
    covered: defaultdict[str, int] = defaultdict(int)
    environments: dict[bytes, dict[str, Any]] = {}
    statistics, parts, size_bytes = StatisticsFold(task), _PartsTable(), 0
    for commit in commits:
        shard = commit.shard_id
        if shard not in by_shard:
            # Most environments are equal: one object for all of them.
            environment = environments.setdefault(canonical_json(commit.environment), commit.environment)
            by_shard[shard] = _Shard(
                shard,
                commit.shard_size_bytes,
                commit.read,
                commit.num_ok,
                commit.index.sha256,
                commit.skipped,
                environment,
            )
        covered[shard] |= view_bits(commit.block)
        statistics.add(commit.statistics)
        parts.add(commit)
        size_bytes += commit.part.size_bytes
    shards = [by_shard[shard] for shard in shard_ids if shard in by_shard]
    skipped: Counter[str] = Counter()
    for shard in shards:
        skipped.update(shard.skipped)
    totals: dict[str, Any] = {
        "num_shards": len(shards),
        "num_samples": sum(shard.num_samples for shard in shards),
        "num_ok": sum(shard.num_ok for shard in shards),
        "num_views": min((_num_complete_views(covered[shard]) for shard in shard_ids), default=0),
        "size_bytes": size_bytes,
        "skipped": dict(sorted(skipped.items())),
        "statistics": statistics.result(),
        "environment": shards[0].environment if shards else {},
    }
    return Fold(totals, _shards_table(shards), parts.result())


def view_bits(block: ViewBlock) -> int:
    """The views of a block as bits above the lowest, which is the eval pass. A set of 50 views would take 2 kB."""
    return 1 if block.is_eval else ((1 << len(block.views)) - 1) << (block.start + 1)


def _num_complete_views(covered: int) -> int:
    """The number of consecutive views from 0 that are covered."""
    views = covered >> 1
    # The position of the lowest bit that is not set.
    return (~views & (views + 1)).bit_length() - 1


@dataclass(frozen=True, slots=True)
class _Shard:
    """The fields of a shard's first commit that describe the shard."""

    shard_id: str
    size_bytes: int
    num_samples: int
    num_ok: int
    index_sha256: str
    skipped: dict[str, int]
    environment: dict[str, Any]


def _shards_table(shards: list[_Shard]) -> pa.Table:
    return pa.table(
        {
            "shard_id": pa.array([shard.shard_id for shard in shards], pa.string()),
            "size_bytes": pa.array([shard.size_bytes for shard in shards], pa.int64()),
            "num_samples": pa.array([shard.num_samples for shard in shards], pa.int64()),
            "num_ok": pa.array([shard.num_ok for shard in shards], pa.int64()),
            "index_sha256": pa.array([shard.index_sha256 for shard in shards], pa.string()),
        }
    )


_PARTS_SCHEMA = pa.schema(
    {
        "shard_id": pa.string(),
        "view": pa.uint16(),
        "path": pa.string(),
        "part_sha256": pa.string(),
        "part_size_bytes": pa.int64(),
        "offset": pa.int64(),
        "size_bytes": pa.int64(),
        "footer_offset": pa.int64(),
        "footer_digest": pa.string(),
        "rows": pa.int64(),
        "digest": pa.string(),
    }
)


class _PartsTable:
    """One row for each (shard, view): everything that a reader needs for its range read."""

    def __init__(self) -> None:
        self._batches: list[pa.RecordBatch] = []
        self._rows: list[tuple[str | int, ...]] = []

    def add(self, commit: Commit) -> None:
        part, footer = commit.part, commit.footer
        self._rows.extend(
            (
                *(commit.shard_id, view.view, part.path, part.sha256, part.size_bytes),
                *(view.offset, view.size_bytes, footer.offset, footer.digest, view.rows, view.digest),
            )
            for view in commit.views
        )
        if len(self._rows) >= ROWS_PER_BATCH:
            self._pack()

    def _pack(self) -> None:
        columns = zip(*self._rows, strict=True)
        arrays = [pa.array(column, item.type) for column, item in zip(columns, _PARTS_SCHEMA, strict=True)]
        self._batches.append(pa.record_batch(arrays, schema=_PARTS_SCHEMA))
        self._rows = []

    def result(self) -> pa.Table:
        if self._rows:
            self._pack()
        return pa.Table.from_batches(self._batches, _PARTS_SCHEMA)
