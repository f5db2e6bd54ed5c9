"""A long-tailed subset of shards, deterministic in the seed, to measure losses on imbalanced data."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import storage
from pipeline.core.errors import ShardError
from pipeline.core.hashing import shuffle_key
from pipeline.core.redaction import redact
from pipeline.shards.members import image_extensions
from pipeline.shards.shard_urls import shard_id, shard_ids
from pipeline.shards.tar import Sample, read_samples
from pipeline.shards.writer import Members, pack_shards
from pipeline.tasks import task_of
from schemas.config import DataConfig
from schemas.recipe import LongTailConfig

_EXTENSIONS = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}


@dataclass(frozen=True, slots=True)
class LongTail:
    """The written shards in order, and the number of images of each class."""

    urls: list[str]
    counts: list[int]


def write_long_tail(urls: Sequence[str], pattern: str, tail: LongTailConfig, data: DataConfig) -> LongTail:
    """Copies the images of the subset, in their order, under ``<shard_id>/<key>``. Equal inputs give equal bytes.

    Args:
        pattern: URL pattern of the new shards, such as ``out/tail-%05d.tar``.
        data: how keys, images and labels are read.

    Raises:
        ShardError: a shard is damaged, or has a sample without image or label.
    """
    shard_ids(urls)
    labels = {name: label for name, label, _ in _labelled(urls, data)}
    subset = draw_long_tail(labels, tail.imbalance, tail.seed)
    counts = [sum(labels[name] == label for name in subset) for label in range(max(labels.values()) + 1)]
    samples = ((name, _members(sample, data)) for name, _, sample in _labelled(urls, data) if name in subset)
    return LongTail(pack_shards(samples, pattern, shard_size=tail.shard_size), counts)


def draw_long_tail(labels: Mapping[str, int], imbalance: float, seed: int) -> set[str]:
    """Sample ids of the subset. It has ``n · imbalance^(-k / (K - 1))`` samples of class k, rounded down, at least one;
    n is the size of the smallest class, so that the profile is exact (Cao 2019, 1906.07413, sec. 4.1). The choice
    depends only on the seed and the ids.

    Args:
        labels: class by sample id.
    """
    by_class: defaultdict[int, list[str]] = defaultdict(list)
    for name, label in labels.items():
        by_class[label].append(name)
    max_count = min(map(len, by_class.values()))
    last = max(1, len(by_class) - 1)
    subset: set[str] = set()
    for rank, label in enumerate(sorted(by_class)):
        count = max(1, int(max_count * imbalance ** (-rank / last)))
        subset |= set(sorted(by_class[label], key=lambda name: shuffle_key(seed, name))[:count])
    return subset


def _labelled(urls: Sequence[str], data: DataConfig) -> Iterator[tuple[str, int, Sample]]:
    """Every sample with its id and class."""
    task = task_of(data)
    with tempfile.TemporaryDirectory() as folder:
        for url in urls:
            for sample in read_samples(storage.local_copy(url, Path(folder)), data, where=url):
                _, classes = task.class_ids(task.rows([sample.target]))
                if len(classes) != 1 or sample.status != "ok":
                    raise ShardError(
                        "a sample of this long-tailed subset has no usable image or no label",
                        code="shard.long-tail-sample",
                        where=f"{redact(url)}, {sample.key}",
                        got=f"status {sample.status}, label {sample.target}",
                        next_step="name other shards, or correct data.label",
                    )
                yield f"{shard_id(url)}/{sample.key}", int(classes[0]), sample


def _members(sample: Sample, data: DataConfig) -> Members:
    readable = image_extensions(data)
    extension = _EXTENSIONS.get(sample.data[:2])
    if extension not in readable:
        extension = readable[0]
    return {extension: sample.data, **task_of(data).encode(sample.target)}
