"""A long-tailed subset of shards, the same for the same seed: what the imbalance of real data does to a loss."""

from __future__ import annotations

import hashlib
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import storage
from pipeline.core.errors import ShardError
from pipeline.core.redaction import redact
from pipeline.shards.members import image_extensions
from pipeline.shards.shard_urls import shard_id, shard_ids
from pipeline.shards.tar import Sample, read_samples
from pipeline.shards.writer import Members, pack_shards
from schemas.config import DataConfig
from schemas.recipe import LongTailConfig

_STARTS = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}


@dataclass(frozen=True, slots=True)
class LongTail:
    """What was written: the shards in order, and the images of each class."""

    urls: list[str]
    counts: list[int]


def write_long_tail(urls: Sequence[str], pattern: str, tail: LongTailConfig, data: DataConfig) -> LongTail:
    """Copies the images that stay, in their order, under ``<shard_id>/<key>``. Equal inputs give equal bytes.

    Args:
        pattern: of the new shards, such as ``out/tail-%05d.tar``.
        data: how keys, images and labels are read.

    Raises:
        ShardError: a shard is damaged, or holds a sample without image or label.
    """
    shard_ids(urls)
    labels = {name: label for name, label, _ in _labelled(urls, data)}
    kept = draw_long_tail(labels, tail.imbalance, tail.seed)
    counts = [sum(labels[name] == label for name in kept) for label in range(max(labels.values()) + 1)]
    stay = ((name, _members(sample, data)) for name, _, sample in _labelled(urls, data) if name in kept)
    return LongTail(pack_shards(stay, pattern, shard_size=tail.shard_size), counts)


def draw_long_tail(labels: Mapping[str, int], imbalance: float, seed: int) -> set[str]:
    """The ids that stay. Of class k, ``n · imbalance^(-k / (K - 1))`` do, rounded down, at least one; n is the size of
    the smallest class, so that the profile is exact (Cao 2019, 1906.07413, sec. 4.1). Which ones depends on the seed
    and the ids alone.

    Args:
        labels: class by sample id.
    """
    by_class: defaultdict[int, list[str]] = defaultdict(list)
    for name, label in labels.items():
        by_class[label].append(name)
    num_most = min(map(len, by_class.values()))
    last = max(1, len(by_class) - 1)
    kept: set[str] = set()
    for rank, label in enumerate(sorted(by_class)):
        count = max(1, int(num_most * imbalance ** (-rank / last)))
        kept |= set(sorted(by_class[label], key=lambda name: _drawn(seed, name))[:count])
    return kept


def _drawn(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()


def _labelled(urls: Sequence[str], data: DataConfig) -> Iterator[tuple[str, int, Sample]]:
    """Every sample with its id and class."""
    with tempfile.TemporaryDirectory() as folder:
        for url in urls:
            for sample in read_samples(storage.local_copy(url, Path(folder)), data, where=url):
                if sample.label is None or sample.status != "ok":
                    raise ShardError(
                        "a long-tailed subset is drawn from samples with an image and a label",
                        where=f"{redact(url)}, {sample.key}",
                        got=f"status {sample.status}, label {sample.label}",
                        next_step="name other shards, or correct data.label",
                    )
                yield f"{shard_id(url)}/{sample.key}", sample.label, sample


def _members(sample: Sample, data: DataConfig) -> Members:
    assert data.label is not None
    readable = image_extensions(data)
    named = _STARTS.get(sample.data[:2])
    extension = named if named in readable else readable[0]
    return {extension: sample.data, data.label: str(sample.label).encode()}
