"""Reads the labels of a finished cache again from its shards. No teacher runs: its outputs do not depend on labels.

The indexes of the build stay, because commits and pinned manifests name them. The new indexes have their digests in
their names, and a manifest that names them is published last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from pipeline import storage
from pipeline.cache.build.imported_means import imported_sha256
from pipeline.cache.build.manifest import publish_shards, read_manifest, read_table, relative, write_manifest
from pipeline.cache.format import layout
from pipeline.cache.format.codec import default_temperature, is_sampled
from pipeline.cache.read.labels import reading_rules
from pipeline.cache.read.reader import ShardEntry, TeacherCache, open_cache
from pipeline.core.errors import CacheError, ConfigError, ShardError
from pipeline.core.hashing import digest
from pipeline.core.redaction import quoted, redact
from pipeline.core.threads import map_ordered
from pipeline.shards.index import ShardIndex, encode_index, index_settings
from pipeline.shards.labels import LabelCount, check_label_member, evenly_spaced
from pipeline.shards.shard_head import read_shard_head
from pipeline.shards.shard_urls import new_place, report_moved
from pipeline.shards.tar import read_samples
from pipeline.tasks import task_of
from schemas.cache_format import Manifest, Relabelled, Statistics
from schemas.config import DataConfig

_NUM_SHARD_HEADS = 8


@dataclass(frozen=True, slots=True)
class Relabelling:
    """The result of ``relabel``.

    Attributes:
        teacher_metrics: on view 0, as ``Task.teacher_metrics`` has them.
        lost_means: the new manifest lacks the class means, because the build computed them from its labels.
        num_given: shards whose URL was given in ``shard_urls``.
    """

    label: str
    count: LabelCount
    teacher_metrics: Mapping[str, float | None]
    lost_means: bool
    num_given: int


@dataclass(frozen=True, slots=True)
class _ShardLabels:
    index_sha256: str
    size_bytes: int
    num_images: int
    num_labelled: int
    statistics: Statistics


def relabel(
    cache_url: str,
    *,
    label: str | None = None,
    shard_urls: Mapping[str, str] | None = None,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Relabelling:
    """Publishes a manifest whose indexes have the current labels of the shards. Reads every shard, decodes no image.

    Shards may have been packed again with the same samples, order and image bytes as in the build.

    Args:
        label: ``data.label``: the member with the target; default: that of the cache.
        shard_urls: where the shards are, by id; default: where the build read them. The new manifest names these URLs.
        progress: called with the number of finished shards and of all shards.

    Raises:
        CacheError: the cache is unfinished, damaged, or was changed meanwhile.
        ConfigError: there is no label to read, or a named shard is not in the cache.
        ShardError: a shard is missing, has samples or images that differ from those of the build, or an invalid label;
            or no sample has the member.
    """
    cache = open_cache(cache_url)
    data = _data_config(cache, label)
    urls = {shard.shard_id: cache.shard_url(shard) for shard in cache.shards}
    given = shard_urls or {}
    if unknown := sorted(given.keys() - urls.keys()):
        raise ConfigError(
            "this cache does not have all named shards",
            code="cache.relabel-unknown-shards",
            where="--shards",
            got=f"{len(unknown)} of {len(given)} shards, such as {unknown[0]}",
            expected=f"the names of the cache's shards: {new_place(urls.values())}",
            next_step="correct the names, or omit --shards if the shards are still where the build read them",
        )
    urls.update(given)
    storage.check_names(cache_url, (layout.relabelled_path(shard, "0" * 64).rpartition("/")[2] for shard in urls))
    shards: list[_ShardLabels] = []

    def relabel_shard(shard: ShardEntry) -> _ShardLabels:
        return _relabel_shard(cache, shard, data, urls[shard.shard_id])

    with report_moved([*urls.values()], "append --shards {}"):
        _check_member(cache, data, urls)
        for shard in map_ordered(relabel_shard, cache.shards, threads=threads, name="relabel"):
            shards.append(shard)
            if progress is not None:
                progress(len(shards), len(cache.shards))
    manifest = _publish(cache, data, shards, urls)
    num_labelled = sum(shard.num_labelled for shard in shards)
    return Relabelling(
        label=str(data.label),
        count=LabelCount(num_labelled, sum(shard.num_images for shard in shards), len(shards)),
        teacher_metrics=task_of(data).teacher_metrics(manifest.statistics),
        lost_means=cache.manifest.class_means is not None and manifest.class_means is None,
        num_given=len(given),
    )


def _data_config(cache: TeacherCache, label: str | None) -> DataConfig:
    rules = reading_rules(cache.data)
    rules = rules if label is None else rules.model_copy(update={"label": label})
    if not task_of(rules).members:
        raise ConfigError(
            "this cache was built without labels, and --label is missing",
            code="cache.relabel-without-label",
            where=redact(cache.url),
            got="data.label: null",
            next_step=f"run: stillroom cache relabel {quoted(cache.url)} --label cls",
        )
    # The index of the build lists the skipped samples as well.
    return rules.model_copy(update={"bad_samples": "skip"})


def _check_member(cache: TeacherCache, data: DataConfig, urls: Mapping[str, str]) -> None:
    """Finds a wrong member in the first samples of a few shards, before all shards are read."""
    heads = [
        read_shard_head(url, data, size_bytes=storage.size(url))
        for url in (urls[shard.shard_id] for shard in evenly_spaced(cache.shards, _NUM_SHARD_HEADS))
    ]
    check_label_member(LabelCount.of_heads(heads, data), data, where=redact(cache.url), option="--label ")


def _relabel_shard(cache: TeacherCache, shard: ShardEntry, data: DataConfig, url: str) -> _ShardLabels:
    with storage.scratch_folder() as scratch:
        local = storage.local_copy(url, scratch)
        index = _with_labels(cache.index(shard), data, local, where=redact(url))
        size_bytes = local.stat().st_size
    encoded = encode_index(index, index_settings(data))
    sha256 = digest(encoded)
    # Equal content has an equal name. An existing file is replaced, because it may be damaged.
    storage.write(storage.join(cache.url, layout.relabelled_path(shard.shard_id, sha256)), encoded)
    num_labelled = int(index.task.has_target(index.ok_targets).sum())
    return _ShardLabels(sha256, size_bytes, index.num_ok, num_labelled, _target_statistics(cache, shard, index))


def _with_labels(index: ShardIndex, data: DataConfig, local: Path, *, where: str) -> ShardIndex:
    """The index with the current labels and offsets of the shard."""
    samples = [
        (sample.key, xxhash.xxh3_64_intdigest(sample.data), sample.target, sample.offset)
        for sample in read_samples(local, data, where=where)
    ]
    keys: list[str] = index.keys.to_pylist()
    expected = list(zip(keys, index.content_hash.tolist(), strict=True))
    if (got := [(key, content_hash) for key, content_hash, *_ in samples]) != expected:
        rows = enumerate(zip(got, expected, strict=False))
        row = next((row for row, (got_sample, expected_sample) in rows if got_sample != expected_sample), None)
        raise ShardError(
            "the samples or images of this shard differ from those of the build",
            code="cache.relabel-other-images",
            where=where if row is None else f"{where}, row {row}, key {expected[row][0]}",
            got=f"{len(got)} samples" if row is None else f"key {got[row][0]}, content hash {got[row][1]:016x}",
            expected=f"{len(expected)} samples" if row is None else f"content hash {expected[row][1]:016x}",
            next_step="restore the images, or build another cache: other images need new teacher outputs",
        )
    return replace(
        index,
        targets=index.task.rows(target for _, _, target, _ in samples),
        offset=np.array([offset for *_, offset in samples], np.int64),
    )


def _target_statistics(cache: TeacherCache, shard: ShardEntry, index: ShardIndex) -> Statistics:
    """From the stored outputs of view 0; empty if its images are mixed. One view suffices for the accuracy."""
    names = index.task.statistics_outputs
    stored = [cache.header.output(name) for name in names]
    # Samples do not show the order of the classes.
    lacks_output = any(output is None or is_sampled(output) for output in stored)
    if cache.header.views["kind"] == "function_matching" or lacks_output or not index.num_ok:
        return Statistics()
    outputs = cache.view(shard.shard_id, 0).outputs
    decoded = {name: outputs[name].decode(temperature=default_temperature(outputs[name].output)) for name in names}
    accumulator = index.task.accumulate()
    accumulator.add(decoded, index.ok_targets)
    return Statistics(**accumulator.result())


def _publish(cache: TeacherCache, data: DataConfig, shards: list[_ShardLabels], urls: dict[str, str]) -> Manifest:
    if read_manifest(cache.url)[1] != cache.manifest_bytes:
        raise CacheError(
            "the cache was changed while its labels were read",
            code="cache.changed-meanwhile",
            where=redact(cache.url),
            next_step="run the command again when no build is running",
        )
    task = task_of(data)
    sums = task.accumulate()
    for shard in shards:
        sums.add_part(shard.statistics)
    counted = Statistics(**sums.result())
    statistics = cache.manifest.statistics.model_copy(
        update={name: getattr(counted, name) for name in task.statistics_fields}
    )
    table = read_table(cache.url, cache.manifest.shards)
    # The offsets of the new indexes are those of the shards that were read, so the manifest names these shards.
    base, paths = relative(urls)
    for name, values in (
        ("path", pa.array([paths[shard.shard_id] for shard in cache.shards], pa.string())),
        ("size_bytes", pa.array([shard.size_bytes for shard in shards], pa.int64())),
        ("index_sha256", pa.array([shard.index_sha256 for shard in shards], pa.string())),
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
