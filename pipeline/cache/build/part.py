"""Build one part: a block of views of one shard, from tar bytes to a commit.

Any task may be killed, repeated or raced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.augment.params import is_canary, sample_keys
from pipeline.augment.pixels import pixel_digest, pixel_mean
from pipeline.cache.build.blocks import holds_class_sums
from pipeline.cache.build.class_means import ClassSums, encode_sums, merge, sum_rows
from pipeline.cache.build.commit import (
    CommitSummary,
    check_fingerprint,
    find_commit,
    publish_commit,
    publish_file,
    revoke,
)
from pipeline.cache.build.header_claim import claim, make_header
from pipeline.cache.build.imported_means import ImportedMeans, keep_means, read_means
from pipeline.cache.build.part_writer import PartWriter, view_ranges
from pipeline.cache.build.statistics import StatisticsSum
from pipeline.cache.format import layout
from pipeline.cache.format.codec import encode, outputs_of, row_bytes
from pipeline.core.config_loading import require
from pipeline.core.errors import CacheError, ConfigError, ShardError
from pipeline.core.hashing import digest
from pipeline.core.redaction import redact
from pipeline.core.threads import prefetch
from pipeline.models.load import require_weights, weights_read_errors
from pipeline.shards.index import (
    STATUSES,
    IndexBuilder,
    ShardIndex,
    check_samples,
    decode_index,
    encode_index,
    index_settings,
    index_shard,
    omissions_of,
)
from pipeline.shards.omissions import Omissions
from pipeline.shards.publish import publish_index
from pipeline.shards.shard_urls import shard_id
from pipeline.shards.tar import MemberRules, Sample, TarNotes, read_samples, unread_links
from pipeline.teacher.inference import GroupOutputs, InferenceOutputs, Teacher, load_teacher, run_inference
from pipeline.teacher.numerics import (
    check_gpu,
    numeric_env,
    pick_device,
    pin_numerics,
    release_freed_memory,
    visible_gpus,
)
from pipeline.teacher.rendering import GroupViews, Rendering, indexed_samples, read_groups
from schemas.cache_format import Commit, FileRef, Header, ViewBlock, aug_param_columns, part_schema
from schemas.config import CacheConfig, Config

_NUM_NAMED = 5


@dataclass(frozen=True, slots=True)
class PartTask:
    """One unit of work: everything a process needs to build one part."""

    config: Config
    shard_url: str
    block: ViewBlock


@dataclass(frozen=True, slots=True)
class IndexTask:
    """An index that is gone while commits of its shard stand: they say which bytes it had."""

    config: Config
    shard_url: str
    sha256: str


@dataclass(frozen=True, slots=True)
class _Builder:
    """What a process keeps from part to part: its teacher, and the header of the cache it writes to."""

    config: Config
    cache: CacheConfig
    teacher: Teacher
    header: Header
    imported: ImportedMeans | None
    gpus: str | None


def cache_config(config: Config) -> CacheConfig:
    """The cache section, checked against the sections it depends on.

    Raises:
        ConfigError: a key that a build needs is missing, or two keys contradict each other.
    """
    require(config, "data.shards", "data.num_classes", "teacher.model", "cache.url", command="cache build")
    cache = config.cache
    assert cache is not None
    require_weights(config.teacher, where="teacher")
    if config.teacher.others:
        raise ConfigError(
            "a cache holds the words of one teacher",
            where="teacher.others",
            got=f"{len(config.teacher.others)} beside teacher.model",
            next_step="append teacher.others=[], and build a cache of each other teacher from a config of its own",
        )
    if config.views.mixes and cache.class_means == "view0":
        raise ConfigError(
            "class means of mixed images mean nothing",
            where="cache.class_means",
            got="view0",
            expected="eval, none or the URL of a file under views.kind=function_matching",
        )
    if cache.class_means in ("eval", "view0"):
        _check_labels(config)
    assert config.data.num_classes is not None
    # What these classes are too few for is found before a teacher is loaded.
    outputs_of(cache, num_classes=config.data.num_classes, embedding_dim=1)
    return cache


def _check_labels(config: Config) -> None:
    if config.data.label is None:
        raise ConfigError("class means need labels", where="data.label", got="null", expected="a member extension")


def prepare(config: Config) -> Header:
    """Loads the teacher and claims the cache for it. The first step of every build, before any work.

    Raises:
        CacheError: the cache was begun by another teacher, plan or encoding, or with other class means.
        ConfigError: class means are to be imported, and the file is not this teacher's.
    """
    if cache_config(config).class_means_url is not None:
        # A process may build again after the file behind the URL has changed.
        _builder.cache_clear()
    builder = _claimed(config)
    if builder.imported is not None:
        keep_means(builder.cache.url, builder.imported)
    return builder.header


def prepare_with_notes(config: Config) -> tuple[str, ...]:
    """``prepare``, and what a user should know of how the teacher's weights were read."""
    prepare(config)
    return _current(config).teacher.loaded.notes


def teacher_of(config: Config) -> tuple[Teacher, Header]:
    """The teacher that a build with this config would ask, as it would ask it, and the header that it would write."""
    builder = _current(config)
    return builder.teacher, builder.header


def _claimed(config: Config) -> _Builder:
    builder = _current(config)
    # Every time: the folder may have been emptied.
    return replace(builder, header=claim(builder.cache.url, builder.header))


def _current(config: Config) -> _Builder:
    """What this process keeps for the config, made again where the weights' file was replaced."""
    # Every time: another job of this process may set threads.
    pin_numerics(config.ray.cpus_per_task)
    weights, stamp = config.teacher.weights_url, None
    if weights is not None:
        with weights_read_errors(weights, where="teacher.weights"):
            stamp = storage.stamp(weights)
    builder = _builder(config.model_dump_json(), stamp)
    check_gpu(builder.teacher.device, builder.gpus)
    return builder


@lru_cache(maxsize=1)
def _builder(config_json: str, weights_stamp: str | None) -> _Builder:  # noqa: ARG001 - other weights, another builder
    """Once a process, whatever number of parts it builds. The header is the one this builder would write."""
    config = Config.model_validate_json(config_json)
    cache = cache_config(config)
    assert config.data.num_classes is not None
    teacher = load_teacher(
        config.teacher,
        num_classes=config.data.num_classes,
        size=config.views.size,
        device=pick_device(config.ray.gpus_per_task > 0),
    )
    imported, module = None, teacher.module
    if cache.class_means_url is not None:
        imported = read_means(cache.class_means_url, num_classes=module.num_classes, embedding_dim=module.embedding_dim)
    header = make_header(teacher, plan=config.views, cache=cache, data=config.data, imported=imported)
    return _Builder(config, cache, teacher, header, imported, gpus=visible_gpus())


@dataclass(slots=True)
class BusyTime:
    """How long the teacher was at work, which its commit must not depend on."""

    seconds: float = 0.0


def build_part(task: PartTask, busy: BusyTime | None = None, omissions: Omissions | None = None) -> Commit:
    """Builds and commits one part, unless that is done. Returns the commit that stands, perhaps of a faster builder.

    Adds to ``busy`` what the teacher took, and to ``omissions`` what reading the shard left out.

    Raises:
        ShardError: the shard is damaged or changed; or it holds a sample that cannot be used under ``data.bad_samples:
            fail``, has no label for class means, or makes the teacher answer NaN or infinity.
        CacheError: the cache is another teacher's, or an output does not fit its encoding.
    """
    builder = _claimed(task.config)
    # A worker may die after its commit and before its answer, and a second builder plans as the first one does.
    done = find_commit(builder.cache.url, shard_id(task.shard_url), task.block)
    if done is not None:
        check_fingerprint(done, builder.header.fingerprint, builder.cache.url)
        return done
    with storage.scratch_folder() as scratch:
        build = _PartBuild(builder, task, scratch, busy or BusyTime())
        commit = build.run()
    if omissions is not None:
        omissions.include(build.omissions)
    return commit


def restore_index(task: IndexTask) -> None:
    """Makes an index anew from its shard; asks no teacher, so that parts stay as they are.

    Raises:
        CacheError: the bytes are not those that the parts of the shard were built with.
        ShardError: the shard is damaged.
    """
    cache = cache_config(task.config)
    shard, where = shard_id(task.shard_url), redact(task.shard_url)
    with storage.scratch_folder() as scratch:
        local = storage.local_copy(task.shard_url, scratch)
        made = _index_bytes(task, local, rules=2)
        if digest(made) != task.sha256:
            # The parts may have been built by a version that knew the first rules alone.
            made = _index_bytes(task, local, rules=1)
    if (got := digest(made)) != task.sha256:
        raise CacheError(
            "an index is gone, and its shard no longer gives the one that the parts were built with",
            where=where,
            got=f"sha256 {got[:16]}",
            expected=task.sha256[:16],
            next_step=f"restore the shard or the index; or remove commits/{shard} in "
            f"{redact(cache.url)} and run the build again, which makes all parts of this shard anew",
        )
    publish_index(storage.join(cache.url, layout.INDEX), shard, made)


def _index_bytes(task: IndexTask, local: Path, *, rules: MemberRules) -> bytes:
    data, where = task.config.data, redact(task.shard_url)
    index = index_shard(local, data, where=where, threads=task.config.ray.cpus_per_task, rules=rules)
    return encode_index(index, index_settings(data))


@dataclass(frozen=True, slots=True)
class _StoredIndex:
    """An index and the very bytes that stand in the cache, which another version of Parquet might write differently."""

    index: ShardIndex
    data: bytes


@dataclass
class _PartBuild:
    """One part under construction."""

    builder: _Builder
    task: PartTask
    scratch: Path
    busy: BusyTime
    sums: ClassSums | None = None
    omissions: Omissions = field(default_factory=Omissions)

    def __post_init__(self) -> None:
        spec, header = self.builder.teacher.loaded.input, self.builder.header
        self.data = self.builder.config.data
        self.shard_id = shard_id(self.task.shard_url)
        self.where = redact(self.task.shard_url)
        self.rendering = Rendering(
            plan=self.builder.config.views, block=self.task.block, size=spec.size, interpolation=spec.interpolation
        )
        self.row_sizes = {output.name: row_bytes(output) for output in header.outputs}
        drawn = {} if self.task.block.is_eval else aug_param_columns(self.builder.config.views)
        self.schema = part_schema(self.row_sizes, drawn)
        self.statistics = StatisticsSum(header)
        self.first_row: int | None = None

    def run(self) -> Commit:
        local = storage.local_copy(self.task.shard_url, self.scratch / "shard")
        known = self._known_index()
        views = self.rendering.view_numbers
        with PartWriter(self.scratch, views, self.schema, row_size_bytes=sum(self.row_sizes.values())) as writer:
            if known is None:
                known = self._fill_and_index(writer, local)
            else:
                notes = TarNotes()
                samples = indexed_samples(local, known.index, self.data, where=self.where, notes=notes)
                self._fill(writer, samples, None)
                self.omissions = unread_links(notes)
            part = writer.close()
        return self._publish(part, known, shard_size_bytes=local.stat().st_size)

    def _known_index(self) -> _StoredIndex | None:
        url = storage.join(self.builder.cache.url, layout.index_path(self.shard_id))
        data = storage.read_if_there(url, max_bytes=storage.MAX_TABLE_BYTES)
        if data is None:
            return None
        index = decode_index(data, where=redact(url), settings=index_settings(self.data))
        check_samples(index, self.data, where=self.task.shard_url)
        return _StoredIndex(index, data)

    def _fill_and_index(self, writer: PartWriter, local: Path) -> _StoredIndex:
        """The first pass over a shard: its index falls out, and is in place before any part.

        A part alone could not say which rows it answers for.
        """
        fresh = IndexBuilder(self.shard_id)
        self._fill(writer, read_samples(local, self.data, where=self.where, notes=fresh.notes), fresh)
        index = fresh.finish()
        check_samples(index, self.data, where=self.task.shard_url)
        self.omissions = omissions_of(index)
        data = encode_index(index, index_settings(self.data))
        publish_index(storage.join(self.builder.cache.url, layout.INDEX), self.shard_id, data)
        return _StoredIndex(index, data)

    def _fill(self, writer: PartWriter, samples: Iterator[Sample], fresh: IndexBuilder | None) -> None:
        threads = self.builder.config.ray.cpus_per_task
        with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
            groups = read_groups(
                samples,
                self.rendering,
                pool,
                shard_id=self.shard_id,
                max_pixels=self.data.max_pixels,
                builder=fresh,
                pinned=self.builder.teacher.device.type == "cuda",
            )
            # Three stages, one group in each: rendered ahead, asked about here, kept behind.
            with closing(prefetch(groups)) as rendered, ThreadPoolExecutor(1, thread_name_prefix="keep") as behind:
                kept = behind.submit(lambda: None)
                for asked in run_inference(rendered, self.builder.teacher):
                    kept.result()
                    kept = behind.submit(self._keep, writer, asked)
                kept.result()

    def _keep(self, writer: PartWriter, asked: GroupOutputs) -> None:
        group, answers = asked.group, asked.outputs()
        self.busy.seconds += asked.busy_s()
        if self.first_row is None:
            self.first_row = int(group.row_N[0])
        for position, view in enumerate(self.rendering.view_numbers):
            self._check_finite(group, view, answers[position])
            writer.add(view, self._rows(group, position, view, answers[position]))
            self.statistics.add(group, answers[position])
        if holds_class_sums(self.builder.cache.class_means, self.task.block):
            self._check_labelled(group)
            rows = sum_rows(answers[0].embedding_ND, group.label_N)
            self.sums = rows if self.sums is None else merge([self.sums, rows])
        release_freed_memory()

    def _check_labelled(self, group: GroupViews) -> None:
        unlabelled = np.flatnonzero(group.label_N < 0)
        if len(unlabelled) and self.data.missing_labels == "refuse":
            raise ShardError(
                "class means need a label for every sample",
                where=f"{self.where}, keys {', '.join(group.samples[row].key for row in unlabelled[:_NUM_NAMED])}",
                next_step="set data.missing_labels=ignore to average over the others, or cache.class_means=none",
            )

    def _check_finite(self, group: GroupViews, view: int, answers: InferenceOutputs) -> None:
        bad_N = ~(np.isfinite(answers.logits_NK).all(1) & np.isfinite(answers.embedding_ND).all(1))
        if bad_N.any():
            keys = [group.samples[row].key for row in np.flatnonzero(bad_N)[:_NUM_NAMED]]
            raise ShardError(
                f"the teacher gave NaN or infinity for {int(bad_N.sum())} rows",
                where=f"{self.where}, view {view}, keys {', '.join(keys)}",
                next_step="use teacher.precision=fp32, or check the weights",
            )

    def _rows(self, group: GroupViews, position: int, view: int, answers: InferenceOutputs) -> pa.RecordBatch:
        row_N, box_N4 = group.row_N, group.box_VN4[position]
        norm_N = np.linalg.norm(answers.embedding_ND.astype(np.float64), axis=1)
        digests, means = self._canaries(group, position, view)
        columns: dict[str, object] = {
            "row": row_N,
            "view": np.full(len(row_N), view, np.uint16),
            "content_hash": group.content_hash_N,
            "box_left": box_N4[:, 0],
            "box_top": box_N4[:, 1],
            "box_width": box_N4[:, 2],
            "box_height": box_N4[:, 3],
            "flip": group.flip_VN[position],
            "mix_row": row_N[group.partner_VN[position]],
            "mix_lambda": group.mix_lambda_VN[position],
            **{name: values_VN[position] for name, values_VN in group.aug_params_VN.items()},
            "embedding_norm": norm_N.astype(np.float32),
            "pixel_digest": digests,
            "pixel_mean": means,
        }
        values = {"logits": answers.logits_NK, "embedding": answers.embedding_ND}
        for output in self.builder.header.outputs:
            columns[output.name] = encode(values[output.name], output, keys=[sample.key for sample in group.samples])
        return pa.record_batch([pa.array(columns[item.name], item.type) for item in self.schema], schema=self.schema)

    def _canaries(self, group: GroupViews, position: int, view: int) -> tuple[list[bytes | None], list[bytes | None]]:
        """Digests and block means of the first ok row of the shard and of about one row in a thousand."""
        keys_N2 = sample_keys(self.builder.config.views.seed, group.sample_ids)
        chosen_N = is_canary(keys_N2, np.full(len(keys_N2), view, np.int64)) | (group.row_N == self.first_row)
        pixels = group.pixels_VNCHW[position]
        digests = [pixel_digest(pixels[row]) if chosen else None for row, chosen in enumerate(chosen_N)]
        means = [pixel_mean(pixels[row]) if chosen else None for row, chosen in enumerate(chosen_N)]
        return digests, means

    def _publish(self, part: Path, stored: _StoredIndex, *, shard_size_bytes: int) -> Commit:
        url, block, index = self.builder.cache.url, self.task.block, stored.index
        ranges, footer = view_ranges(part, dict.fromkeys(self.rendering.view_numbers, index.num_ok))
        statuses = Counter(STATUSES[code] for code in index.status.tolist())
        commit = Commit(
            fingerprint=self.builder.header.fingerprint,
            shard_id=self.shard_id,
            shard_size_bytes=shard_size_bytes,
            block=block,
            part=publish_file(url, part, layout.part_path(self.shard_id, block)),
            index=FileRef(
                path=layout.index_path(self.shard_id), sha256=digest(stored.data), size_bytes=len(stored.data)
            ),
            means=self._publish_means(),
            num_ok=index.num_ok,
            read=len(index),
            written=index.num_ok,
            skipped={status: count for status, count in sorted(statuses.items()) if status != "ok"},
            views=ranges,
            footer=footer,
            statistics=self.statistics.result(),
            environment=numeric_env(self.builder.teacher.device, batch_size=self.builder.teacher.batch_size),
        )
        return self._publish_commit(commit)

    def _publish_commit(self, commit: Commit) -> Commit:
        """A commit counts only under its own header, which ``gc --unused-header`` may have removed while no commit was
        there; then another builder may have claimed the cache since."""
        url, header = self.builder.cache.url, self.builder.header
        published = publish_commit(url, commit)
        check_fingerprint(published, header.fingerprint, url)
        try:
            claim(url, header)
        except CacheError as error:
            if published is commit and error.code == "cache.other-header":
                revoke(url, [CommitSummary.of(commit)])
            raise
        return published

    def _publish_means(self) -> FileRef | None:
        if self.sums is None:
            return None
        local = self.scratch / "means.parquet"
        local.write_bytes(encode_sums(self.sums))
        return publish_file(self.builder.cache.url, local, layout.means_path(self.shard_id, self.task.block))
