"""Labels of a finished cache read again from its shards, without the teacher: labels decide no teacher output.

The indexes of the build stay, since commits and pinned manifests name them. The new ones have their content's hash in
their names, and a manifest that names them is published last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from pipeline import storage
from pipeline.cache.build.imported_means import imported_sha256
from pipeline.cache.build.manifest import publish_shards, read_manifest, read_table, relative, write_manifest
from pipeline.cache.build.ranking import class_ranks
from pipeline.cache.format import layout
from pipeline.cache.read.labels import reading_rules
from pipeline.cache.read.reader import ShardEntry, TeacherCache, open_cache
from pipeline.core.errors import CacheError, ConfigError, ShardError
from pipeline.core.hashing import digest
from pipeline.core.redaction import quoted, redact
from pipeline.core.threads import map_ordered
from pipeline.shards.index import NO_LABEL, ShardIndex, encode_index, index_settings
from pipeline.shards.labels import LabelCount, check_label_member, evenly_spaced
from pipeline.shards.shard_head import read_shard_head
from pipeline.shards.shard_urls import new_place, report_moved
from pipeline.shards.tar import read_samples
from schemas.cache_format import Manifest, Relabelled, Statistics
from schemas.config import DataConfig

_NUM_PEEKED = 8
_HITS = ("labelled", "top1_hits", "top5_hits")


@dataclass(frozen=True, slots=True)
class Relabelling:
    """What a relabelling came to.

    Attributes:
        lost_means: class means that the build computed by its own labels are left out.
        num_given: shards that were read where ``shard_urls`` of ``relabel`` has them.
    """

    label: str
    count: LabelCount
    statistics: Statistics
    lost_means: bool
    num_given: int


@dataclass(frozen=True, slots=True)
class _OfShard:
    index_sha256: str
    size_bytes: int
    num_images: int
    class_counts: Counter[int]
    hits: Counter[str]


def relabel(
    cache_url: str,
    *,
    label: str | None = None,
    shard_urls: Mapping[str, str] | None = None,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Relabelling:
    """Publishes a manifest whose indexes have the labels that the shards hold now. Reads every shard, decodes nothing.

    Shards may have been packed again: samples, their order and the bytes of their images must be those of the build.

    Args:
        label: member extension of the class index; default: the cache's.
        shard_urls: where the shards are, by id; of others, where the build found them. The manifest has these places.
        progress: called with the number of shards done and of all.

    Raises:
        CacheError: the cache is not finished, damaged, or was changed meanwhile.
        ConfigError: no label is named, or a shard that the cache does not have.
        ShardError: a shard is missing, has other samples or images than the build saw, or a label that cannot be used;
            or no sample has that member.
    """
    cache = open_cache(cache_url)
    data = _reading(cache, label)
    urls = {shard.shard_id: cache.shard_url(shard) for shard in cache.shards}
    given = shard_urls or {}
    if strange := sorted(given.keys() - urls.keys()):
        raise ConfigError(
            "shards are named that this cache does not have",
            code="cache.relabel-unknown-shards",
            where="--shards",
            got=f"{len(strange)} of {len(given)} shards, such as {strange[0]}",
            expected=f"the names of the cache's shards: {new_place(urls.values())}",
            next_step="correct the names, or leave --shards out where the shards are where the build found them",
        )
    urls.update(given)
    storage.check_names(cache_url, (layout.relabelled_path(shard, "0" * 64).rpartition("/")[2] for shard in urls))
    found: list[_OfShard] = []

    def relabel_shard(shard: ShardEntry) -> _OfShard:
        return _relabel_shard(cache, shard, data, urls[shard.shard_id])

    with report_moved([*urls.values()], "append --shards {}"):
        _check_member(cache, data, urls)
        for of_shard in map_ordered(relabel_shard, cache.shards, threads=threads, name="relabel"):
            found.append(of_shard)
            if progress is not None:
                progress(len(found), len(cache.shards))
    manifest = _publish(cache, data, found, urls)
    num_labelled = sum(of_shard.class_counts.total() for of_shard in found)
    count = LabelCount(num_labelled, sum(of_shard.num_images for of_shard in found), len(found))
    lost = cache.manifest.class_means is not None and manifest.class_means is None
    return Relabelling(str(data.label), count, manifest.statistics, lost, len(given))


def _reading(cache: TeacherCache, label: str | None) -> DataConfig:
    rules = reading_rules(cache.data)
    label = label or rules.label
    if label is None:
        raise ConfigError(
            "this cache was built without labels, and no member is named that holds them",
            code="cache.relabel-without-label",
            where=redact(cache.url),
            got="data.label: null",
            next_step=f"run: stillroom cache relabel {quoted(cache.url)} --label cls",
        )
    # Samples that the build left out are in its index as well.
    return rules.model_copy(update={"label": label, "bad_samples": "skip"})


def _check_member(cache: TeacherCache, data: DataConfig, urls: Mapping[str, str]) -> None:
    """A wrong member is known from the first samples, before all shards are read."""
    seen = [
        read_shard_head(url, data, size_bytes=storage.size(url))
        for url in (urls[shard.shard_id] for shard in evenly_spaced(cache.shards, _NUM_PEEKED))
    ]
    found = LabelCount.from_labels([one.label_N for one in seen], [one.members for one in seen])
    check_label_member(found, data, where=redact(cache.url), option="--label ")


def _relabel_shard(cache: TeacherCache, shard: ShardEntry, data: DataConfig, url: str) -> _OfShard:
    with storage.scratch_folder() as scratch:
        local = storage.local_copy(url, scratch)
        index = _relabelled(cache.index(shard), data, local, where=redact(url))
        size_bytes = local.stat().st_size
    encoded = encode_index(index, index_settings(data))
    sha256 = digest(encoded)
    # Equal content has an equal name; written also where it is there, since that file may be damaged.
    storage.write(storage.join(cache.url, layout.relabelled_path(shard.shard_id, sha256)), encoded)
    label_M = index.label[index.ok]
    class_counts = Counter[int](label_M[label_M != NO_LABEL].tolist())
    return _OfShard(sha256, size_bytes, len(label_M), class_counts, _hits(cache, shard, label_M))


def _relabelled(index: ShardIndex, data: DataConfig, local: Path, *, where: str) -> ShardIndex:
    """The index with the labels and places that the shard has now."""
    samples = [
        (sample.key, xxhash.xxh3_64_intdigest(sample.data), sample.label, sample.offset)
        for sample in read_samples(local, data, where=where)
    ]
    keys: list[str] = index.keys.to_pylist()
    expected = list(zip(keys, index.content_hash.tolist(), strict=True))
    if (got := [(key, content_hash) for key, content_hash, *_ in samples]) != expected:
        row = next((row for row, (one, other) in enumerate(zip(got, expected, strict=False)) if one != other), None)
        raise ShardError(
            "this shard holds other samples or images than the cache was built from",
            code="cache.relabel-other-images",
            where=where if row is None else f"{where}, row {row}, key {expected[row][0]}",
            got=f"{len(got)} samples" if row is None else f"key {got[row][0]}, content hash {got[row][1]:016x}",
            expected=f"{len(expected)} samples" if row is None else f"content hash {expected[row][1]:016x}",
            next_step="restore the images, or build another cache: other images need the teacher",
        )
    return replace(
        index,
        label=np.array([NO_LABEL if label is None else label for _, _, label, _ in samples], np.int32),
        offset=np.array([offset for *_, offset in samples], np.int64),
    )


def _hits(cache: TeacherCache, shard: ShardEntry, label_M: NDArray[np.int32]) -> Counter[str]:
    """Of the stored logits of view 0, where images are not mixed: one view is enough for a teacher's accuracy."""
    if cache.header.views["kind"] == "function_matching" or cache.header.output("logits") is None or not len(label_M):
        return Counter()
    logits_MK = cache.view(shard.shard_id, 0).logits_NK
    assert logits_MK is not None, "the header has such an output"
    known = label_M != NO_LABEL
    rank = class_ranks(logits_MK[known], label_M[known])
    return Counter(labelled=int(known.sum()), top1_hits=int((rank < 1).sum()), top5_hits=int((rank < 5).sum()))


def _publish(cache: TeacherCache, data: DataConfig, found: list[_OfShard], urls: dict[str, str]) -> Manifest:
    if read_manifest(cache.url)[1] != cache.manifest_bytes:
        raise CacheError(
            "the cache was changed while its labels were read",
            code="cache.changed-meanwhile",
            where=redact(cache.url),
            next_step="run the command again once no build is running",
        )
    hits = sum((of_shard.hits for of_shard in found), Counter[str]())
    classes = Counter[int]()
    if hits["labelled"]:
        for of_shard in found:
            classes.update(of_shard.class_counts)
    statistics = cache.manifest.statistics.model_copy(
        update={**{name: hits[name] for name in _HITS}, "class_counts": dict(sorted(classes.items()))}
    )
    table = read_table(cache.url, cache.manifest.shards)
    # The offsets of the new indexes hold for the shards that were read, so these are the cache's shards from now on.
    base, paths = relative(urls)
    for name, values in (
        ("path", pa.array([paths[shard.shard_id] for shard in cache.shards], pa.string())),
        ("size_bytes", pa.array([of_shard.size_bytes for of_shard in found], pa.int64())),
        ("index_sha256", pa.array([of_shard.index_sha256 for of_shard in found], pa.string())),
    ):
        table = table.set_column(table.schema.get_field_index(name), name, values)
    is_imported = imported_sha256(cache.header) is not None
    manifest = cache.manifest.model_copy(
        update={
            "base": base,
            "statistics": statistics,
            "shards": publish_shards(cache.url, table),
            "class_means": cache.manifest.class_means if is_imported else None,
            "labels": Relabelled(data=index_settings(data)),
        }
    )
    write_manifest(cache.url, manifest)
    return manifest
