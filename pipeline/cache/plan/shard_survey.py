"""How many rows shards hold, and which labels: from commits and indexes where there are any, else by a sample.

A sample reads the first bytes of a few shards and takes their density for that of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.cache.build.commit import CommitSummary
from pipeline.core.redaction import redact
from pipeline.shards.index import ShardIndex, decode_index
from pipeline.shards.labels import LabelCount, spread
from pipeline.shards.publish import index_name
from pipeline.shards.shard_head import ShardHead, read_shard_head
from schemas.config import DataConfig

_READ_THREADS = 16
_NUM_SAMPLED = 8
T = TypeVar("T")
# Shards that are alike say little of the others, and a single one nothing.
_LEAST_SPREAD, _SPREAD_OF_ONE = 0.05, 0.2


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number between ``low`` and ``high``; all three are equal where it was counted."""

    low: float
    expected: float
    high: float

    @classmethod
    def exactly(cls, value: float) -> Estimate:
        return cls(value, value, value)

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.low + other.low, self.expected + other.expected, self.high + other.high)

    def __mul__(self, other: Estimate | float) -> Estimate:
        by = other if isinstance(other, Estimate) else Estimate.exactly(other)
        return Estimate(self.low * by.low, self.expected * by.expected, self.high * by.high)

    @property
    def is_exact(self) -> bool:
        return self.low == self.high


def total(parts: Iterable[Estimate]) -> Estimate:
    return sum(parts, Estimate.exactly(0))


@dataclass(frozen=True, slots=True)
class ShardSurvey:
    """What is known of the shards.

    Attributes:
        rows: usable samples by shard id; of a sampled shard all with an image, since nothing is decoded.
        num_counted: shards whose rows were counted.
        num_indexes: those that stand in the first of the folders; ``num_indexes_read`` of any.
        num_peeks: shards whose beginning was read.
        labels: int32 labels in tar order of a few shards, spread over the list; ``NO_LABEL`` for none.
        label_count: of these; with the members seen where no label was found.
    """

    rows: dict[str, Estimate]
    num_counted: int
    num_indexes: int
    num_indexes_read: int
    num_shard_heads: int
    labels: tuple[NDArray[np.int32], ...]
    label_count: LabelCount

    @property
    def num_rows(self) -> Estimate:
        return total(self.rows.values())


def survey_shards(
    by_id: Mapping[str, str],
    sizes: Mapping[str, int],
    commits: Sequence[CommitSummary],
    data: DataConfig,
    *,
    index_urls: Sequence[str],
) -> ShardSurvey:
    """Looks at shards (id to URL, id to bytes) without decoding.

    Args:
        index_urls: folders that may hold ``<shard_id>.parquet``, best first.

    Raises:
        ShardError: a sampled shard has no sample with an image.
        CacheError: an index is damaged.
    """
    paths = _index_paths(by_id, index_urls)
    counts = {commit.shard_id: commit.num_ok for commit in commits if commit.shard_id in by_id}
    sampled = _spread(list(by_id))
    expected = [shard for shard in paths if shard not in counts or shard in sampled]
    indexes = _in_threads(expected, lambda shard: _read_index(paths[shard]))
    counts |= {shard: index.num_ok for shard, index in indexes.items()}
    unknown = [shard for shard in by_id if shard not in counts]
    looked_at = list(dict.fromkeys([*_spread(unknown), *(shard for shard in sampled if shard not in indexes)]))
    shard_heads = _in_threads(looked_at, lambda shard: read_shard_head(by_id[shard], data, size_bytes=sizes[shard]))
    labels = [_labels(indexes[shard]) if shard in indexes else shard_heads[shard].label_N for shard in sampled]
    count = LabelCount.of(labels)
    if data.label is not None and not count.num_labelled:
        unseen = [shard for shard in sampled if shard not in shard_heads]
        shard_heads |= _in_threads(unseen, lambda shard: read_shard_head(by_id[shard], data, size_bytes=sizes[shard]))
        count = LabelCount.of(labels, [shard_heads[shard].members for shard in sampled])
    estimates = _estimate(unknown, sizes, {shard: shard_heads[shard] for shard in _spread(unknown)})
    return ShardSurvey(
        rows={shard: estimates[shard] if shard in estimates else Estimate.exactly(counts[shard]) for shard in by_id},
        num_counted=len(counts),
        num_indexes=sum(url == storage.join(index_urls[0], index_name(shard)) for shard, url in paths.items()),
        num_indexes_read=len(indexes),
        num_shard_heads=len(shard_heads),
        labels=tuple(labels),
        label_count=count,
    )


def _index_paths(by_id: Mapping[str, str], index_urls: Sequence[str]) -> dict[str, str]:
    """The URL of the index of every shard that has one, by shard id."""
    found: dict[str, str] = {}
    for folder in index_urls:
        present = set(storage.listing(folder))
        for shard in by_id:
            if index_name(shard) in present:
                found.setdefault(shard, storage.join(folder, index_name(shard)))
    return found


def _read_index(url: str) -> ShardIndex:
    return decode_index(storage.read(url, max_bytes=storage.MAX_TABLE_BYTES), where=redact(url))


def _in_threads(shards: Sequence[str], work: Callable[[str], T]) -> dict[str, T]:
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        return dict(zip(shards, pool.map(work, shards), strict=True))


def _spread(shards: Sequence[str]) -> list[str]:
    return spread(shards, _NUM_SAMPLED)


def _labels(index: ShardIndex) -> NDArray[np.int32]:
    return index.label[index.ok]


def _estimate(
    unknown: Sequence[str], sizes: Mapping[str, int], shard_heads: Mapping[str, ShardHead]
) -> dict[str, Estimate]:
    """Rows of shards by their size and the density of those that were looked at; of a shard seen whole, its count."""
    if not unknown:
        return {}
    density = _density(list(shard_heads.values()))
    whole = {shard: found for shard, found in shard_heads.items() if found.covered_bytes == sizes[shard]}
    return {
        shard: Estimate.exactly(whole[shard].num_samples) if shard in whole else density * sizes[shard]
        for shard in unknown
    }


def _density(shard_heads: Sequence[ShardHead]) -> Estimate:
    """Rows a byte: over all that was seen, and in the thinnest and the densest shard."""
    each = [found.num_samples / found.covered_bytes for found in shard_heads]
    expected = sum(found.num_samples for found in shard_heads) / sum(found.covered_bytes for found in shard_heads)
    spread = _SPREAD_OF_ONE if len(each) == 1 else _LEAST_SPREAD
    return Estimate(min(*each, (1 - spread) * expected), expected, max(*each, (1 + spread) * expected))
