"""Rows and targets of the shards: from commits and indexes where these exist, else estimated from a sample.

The sample reads the first bytes of a few shards and applies their density, in rows a byte, to all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pipeline import storage
from pipeline.cache.build.commit import CommitSummary
from pipeline.core.threads import map_ordered
from pipeline.shards.labels import LabelCount, evenly_spaced
from pipeline.shards.publish import index_name, read_index
from pipeline.shards.shard_head import ShardHead, read_shard_head
from pipeline.tasks import Targets, task_of
from schemas.config import DataConfig

_READ_THREADS = 16
_NUM_SAMPLED = 8
T = TypeVar("T")
# Equal densities in a small sample do not prove that all shards are equal, and one shard proves nothing.
_MIN_SPREAD, _SPREAD_OF_SINGLE_SHARD = 0.05, 0.2


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number between ``low`` and ``high``; all three are equal if it was counted."""

    low: float
    expected: float
    high: float

    @classmethod
    def exactly(cls, value: float) -> Estimate:
        return cls(value, value, value)

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.low + other.low, self.expected + other.expected, self.high + other.high)

    def __mul__(self, other: Estimate | float) -> Estimate:
        factor = other if isinstance(other, Estimate) else Estimate.exactly(other)
        return Estimate(self.low * factor.low, self.expected * factor.expected, self.high * factor.high)

    @property
    def is_exact(self) -> bool:
        return self.low == self.high


def total(estimates: Iterable[Estimate]) -> Estimate:
    return sum(estimates, Estimate.exactly(0))


@dataclass(frozen=True, slots=True)
class ShardSurvey:
    """Counts and estimates of the shards.

    Attributes:
        rows: usable samples by shard id; of a sampled shard all samples with an image, since nothing is decoded.
        num_counted: shards whose rows were counted.
        targets: target columns in tar order of a few shards, spread over the list.
        label_count: counts of these targets; includes the members of the samples if no target was found.
    """

    rows: dict[str, Estimate]
    num_counted: int
    targets: tuple[Targets, ...]
    label_count: LabelCount

    @property
    def num_rows(self) -> Estimate:
        return total(self.rows.values())


def survey_shards(
    urls: Mapping[str, str],
    sizes: Mapping[str, int],
    commits: Sequence[CommitSummary],
    data: DataConfig,
    *,
    index_urls: Sequence[str],
) -> ShardSurvey:
    """Surveys the shards without decoding an image.

    Args:
        urls: shard id to URL.
        sizes: shard id to bytes.
        index_urls: folders that may hold ``<shard_id>.parquet``; the first one that does is read.

    Raises:
        ShardError: a sampled shard has no sample with an image.
        CacheError: an index is damaged.
    """

    def read_heads(shards: Sequence[str]) -> dict[str, ShardHead]:
        return _in_threads(shards, lambda shard: read_shard_head(urls[shard], data, size_bytes=sizes[shard]))

    index_paths = _index_paths(urls, index_urls)
    counts = {commit.shard_id: commit.num_ok for commit in commits if commit.shard_id in urls}
    sampled = evenly_spaced(list(urls), _NUM_SAMPLED)
    indexed = [shard for shard in index_paths if shard not in counts or shard in sampled]
    indexes = _in_threads(indexed, lambda shard: read_index(index_paths[shard]))
    counts |= {shard: index.num_ok for shard, index in indexes.items()}
    uncounted = [shard for shard in urls if shard not in counts]
    uncounted_sample = evenly_spaced(uncounted, _NUM_SAMPLED)
    without_index = [shard for shard in sampled if shard not in indexes]
    heads = read_heads(list(dict.fromkeys([*uncounted_sample, *without_index])))
    task = task_of(data)
    targets = [indexes[shard].ok_targets if shard in indexes else heads[shard].targets for shard in sampled]
    by_shard = [(task, columns) for columns in targets]
    label_count = LabelCount.of(by_shard)
    if task.members and not label_count.num_labelled:
        # Only a shard's head lists the members, which the message about missing labels names.
        heads |= read_heads([shard for shard in sampled if shard not in heads])
        label_count = LabelCount.of(by_shard, [heads[shard].members for shard in sampled])
    rows = {shard: Estimate.exactly(count) for shard, count in counts.items()}
    if uncounted:
        rows |= _estimate_rows(uncounted, sizes, {shard: heads[shard] for shard in uncounted_sample})
    return ShardSurvey(
        rows={shard: rows[shard] for shard in urls},
        num_counted=len(counts),
        targets=tuple(targets),
        label_count=label_count,
    )


def _index_paths(urls: Mapping[str, str], index_urls: Sequence[str]) -> dict[str, str]:
    """The URL of the index of each shard that has one, by shard id."""
    paths: dict[str, str] = {}
    for folder in index_urls:
        names = set(storage.listing(folder))
        for shard in urls:
            if index_name(shard) in names:
                paths.setdefault(shard, storage.join(folder, index_name(shard)))
    return paths


def _in_threads(shards: Sequence[str], read: Callable[[str], T]) -> dict[str, T]:
    return dict(zip(shards, map_ordered(read, shards, threads=_READ_THREADS), strict=True))


def _estimate_rows(
    uncounted: Sequence[str], sizes: Mapping[str, int], heads: Mapping[str, ShardHead]
) -> dict[str, Estimate]:
    """Rows from the size of a shard and the density of the sample; exact if the head covers the shard."""
    density = _density(list(heads.values()))
    counted = {
        shard: Estimate.exactly(head.num_samples) for shard, head in heads.items() if head.covered_bytes == sizes[shard]
    }
    return {shard: counted.get(shard) or density * sizes[shard] for shard in uncounted}


def _density(heads: Sequence[ShardHead]) -> Estimate:
    """Rows a byte: over all heads, and in the least and the most dense shard."""
    densities = [head.num_samples / head.covered_bytes for head in heads]
    expected = sum(head.num_samples for head in heads) / sum(head.covered_bytes for head in heads)
    spread = _SPREAD_OF_SINGLE_SHARD if len(heads) == 1 else _MIN_SPREAD
    return Estimate(min(*densities, (1 - spread) * expected), expected, max(*densities, (1 + spread) * expected))
