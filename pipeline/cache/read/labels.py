"""How many images of a cache have a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline import storage
from pipeline.cache.build.commit import CommitSummary
from pipeline.cache.format.files import read_file
from pipeline.cache.read.reader import TeacherCache
from pipeline.core.errors import StillroomError
from pipeline.core.redaction import redact
from pipeline.shards.index import ShardIndex, data_keys, decode_index
from pipeline.shards.labels import LabelCount, count_labels
from pipeline.shards.shard_head import read_shard_head
from schemas.config import DataConfig


def cached_labels(cache: TeacherCache) -> LabelCount:
    """The labels of a finished cache, counted in its indexes: of many shards, in an even sample. If no image has a
    label, the result has the members of the first shard, if that can be read.

    Raises:
        CacheError: an index is damaged or missing.
    """
    labels = count_labels(cache.shards, cache.index)
    if labels.num_labelled or not cache.shards:
        return labels
    first = cache.shards[0]
    try:
        rules = reading_rules(cache.data)
        head = read_shard_head(cache.shard_url(first), rules, size_bytes=first.size_bytes)
    except StillroomError:
        # A cache can be read where its shards are missing.
        return labels
    first_count = LabelCount.of_heads([head], rules)
    return replace(labels, members=first_count.members, readable=first_count.readable)


def committed_labels(cache_url: str, commits: Sequence[CommitSummary]) -> LabelCount:
    """The labels of an unfinished cache, counted in the indexes of the shards that have a commit.

    Raises:
        CacheError: an index is damaged or missing.
    """

    def read(path: str) -> ShardIndex:
        return decode_index(read_file(cache_url, path), where=redact(storage.join(cache_url, path)))

    return count_labels(sorted({commit.index for commit in commits}), read)


def reading_rules(settings: Mapping[str, Any]) -> DataConfig:
    """A data section with the settings of a cache's indexes alone."""
    return DataConfig.model_validate(data_keys(settings))
