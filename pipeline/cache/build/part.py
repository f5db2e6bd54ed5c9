"""Build one part: a block of views of one shard, from tar bytes to a commit.

A task may be killed, repeated or raced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from pipeline import storage
from pipeline.augment.params import is_canary, sample_keys
from pipeline.augment.pixels import pixel_digest, pixel_mean
from pipeline.augment.stored_pixels import encoder_environment
from pipeline.cache.build.blocks import holds_class_sums
from pipeline.cache.build.class_means import ClassSums, encode_sums, merge, sum_rows
from pipeline.cache.build.commit import check_fingerprint, find_commit, publish_file
from pipeline.cache.build.context import BuildContext, current_context
from pipeline.cache.build.header_claim import publish_under_header
from pipeline.cache.build.part_writer import PartWriter, view_ranges
from pipeline.cache.build.shard_index import StoredIndex, find_index, publish_new_index
from pipeline.cache.build.statistics import StatisticsSum
from pipeline.cache.format import layout
from pipeline.cache.format.codec import RowIdentity, column_of, encode, has_maps, row_bytes, with_column
from pipeline.core.errors import ShardError
from pipeline.core.redaction import redact
from pipeline.core.threads import prefetch
from pipeline.shards.index import STATUSES, IndexBuilder, omissions_of
from pipeline.shards.omissions import Omissions
from pipeline.shards.shard_urls import shard_id
from pipeline.shards.tar import Sample, TarNotes, read_samples, unread_links
from pipeline.tasks import TeacherOutputs
from pipeline.teacher.inference import GroupOutputs, run_inference
from pipeline.teacher.numerics import numeric_env, release_freed_memory
from pipeline.teacher.rendering import GroupViews, Rendering, indexed_samples, read_groups
from schemas.cache_format import PIXEL_HASH, PIXELS, Commit, FileRef, ViewBlock, aug_param_columns, part_schema
from schemas.config import Config

_NUM_NAMED = 5


@dataclass(frozen=True, slots=True)
class PartTask:
    """One unit of work: everything that a process needs to build one part."""

    config: Config
    shard_url: str
    block: ViewBlock


@dataclass(slots=True)
class BusyTime:
    """Seconds for which the teacher computed. Not in the commit, whose bytes must not depend on it."""

    seconds: float = 0.0


def build_part(task: PartTask, busy: BusyTime | None = None, omissions: Omissions | None = None) -> Commit:
    """Builds and commits one part, unless it is committed. Returns its commit, perhaps that of a faster builder.

    Adds the teacher's time to ``busy``, and what reading the shard left out to ``omissions``.

    Raises:
        ShardError: the shard is damaged or changed; or it has a sample that cannot be used under ``data.bad_samples:
            fail``, a sample without a label for class means, or one whose outputs are NaN or infinite.
        CacheError: the cache is another teacher's, or an output does not fit its encoding.
    """
    context = current_context(task.config).claimed()
    # A worker may have died after its commit, and a second build plans the same parts as the first.
    committed = find_commit(context.cache.url, shard_id(task.shard_url), task.block)
    if committed is not None:
        check_fingerprint(committed, context.header.fingerprint, context.cache.url)
        return committed
    with storage.scratch_folder() as scratch:
        build = PartBuild(context, task, scratch, busy or BusyTime())
        commit = build.run()
    if omissions is not None:
        omissions.include(build.omissions)
    return commit


class PartBuild:
    """One part under construction."""

    def __init__(self, context: BuildContext, task: PartTask, scratch: Path, busy: BusyTime) -> None:
        plan, spec = context.config.views, context.teacher.loaded.input
        self.context, self.task, self.scratch, self.busy = context, task, scratch, busy
        self.data = context.config.data
        self.shard_id, self.where = shard_id(task.shard_url), redact(task.shard_url)
        self.rendering = Rendering.of(self.shard_id, plan, task.block, spec, self.data)
        self.row_sizes = {output.name: row_bytes(output) for output in with_column(context.header.outputs)}
        # The eval pass has neither the options of the plan nor stored views.
        columns = () if task.block.is_eval else (aug_param_columns(plan), context.header.pixel_type)
        self.schema = part_schema(self.row_sizes, *columns)
        self.statistics = StatisticsSum(context.header.outputs, self.rendering.task, context.head)
        self.sums: ClassSums | None = None
        self.omissions = Omissions()
        self.first_row: int | None = None

    def run(self) -> Commit:
        local = storage.local_copy(self.task.shard_url, self.scratch / "shard")
        stored = find_index(self.context.cache.url, self.task.shard_url, self.data)
        views = self.rendering.view_numbers
        row_size_bytes, maps = sum(self.row_sizes.values()), has_maps(self.context.header.outputs)
        with PartWriter(self.scratch, views, self.schema, row_size_bytes=row_size_bytes, has_maps=maps) as writer:
            if stored is None:
                stored = self._fill_and_index(writer, local)
            else:
                notes = TarNotes()
                samples = indexed_samples(local, stored.index, self.data, where=self.where, notes=notes)
                self._fill(writer, samples, None)
                self.omissions = unread_links(notes)
            part = writer.close()
        return self.publish(part, stored, shard_size_bytes=local.stat().st_size)

    def _fill_and_index(self, writer: PartWriter, local: Path) -> StoredIndex:
        """The first pass over a shard also indexes it. The index is published before any part, whose rows it names."""
        builder = IndexBuilder(self.shard_id, self.rendering.task)
        self._fill(writer, read_samples(local, self.data, where=self.where, notes=builder.notes), builder)
        index = builder.finish()
        stored = publish_new_index(self.context.cache.url, self.task.shard_url, index, self.data)
        self.omissions = omissions_of(index)
        return stored

    def _fill(self, writer: PartWriter, samples: Iterator[Sample], builder: IndexBuilder | None) -> None:
        threads = self.context.config.ray.cpus_per_task
        with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
            groups = read_groups(
                samples,
                self.rendering,
                pool,
                builder=builder,
                pinned=self.context.teacher.device.type == "cuda",
            )
            # Three stages, with one group in each: rendering ahead, inference in this thread, storing behind.
            with closing(prefetch(groups)) as rendered, ThreadPoolExecutor(1, thread_name_prefix="store") as behind:
                storing = behind.submit(lambda: None)
                for outputs in run_inference(rendered, self.context.teacher):
                    storing.result()
                    storing = behind.submit(self._store, writer, outputs)
                storing.result()

    def _store(self, writer: PartWriter, group_outputs: GroupOutputs) -> None:
        group, by_view = group_outputs.group, group_outputs.outputs()
        self.busy.seconds += group_outputs.busy_s()
        if self.first_row is None:
            self.first_row = int(group.row_N[0])
        for position, (view, outputs) in enumerate(zip(self.rendering.view_numbers, by_view, strict=True)):
            self._check_finite(group, view, outputs)
            writer.add(view, self.record_batch(group, position, view, outputs))
            self.statistics.add(group, outputs, position=position, view=view)
        if holds_class_sums(self.context.cache.class_means, self.task.block):
            self._check_labelled(group)
            task = self.rendering.task
            assert task.embedding is not None, "class means are those of embeddings"
            rows, class_M = task.class_ids(group.targets)
            sums = sum_rows(by_view[0][task.embedding][rows], class_M)
            self.sums = sums if self.sums is None else merge([self.sums, sums])
        release_freed_memory()

    def _check_labelled(self, group: GroupViews) -> None:
        unlabelled = np.flatnonzero(~self.rendering.task.has_target(group.targets))
        if len(unlabelled) and self.data.missing_labels == "refuse":
            raise ShardError(
                "class means need a label for every sample",
                code="shard.unlabelled-samples",
                where=f"{self.where}, keys {', '.join(group.samples[row].key for row in unlabelled[:_NUM_NAMED])}",
                next_step="set data.missing_labels=ignore to average over the others, or cache.class_means=none",
            )

    def _check_finite(self, group: GroupViews, view: int, outputs: TeacherOutputs) -> None:
        bad_N = ~np.all([np.isfinite(values.reshape(len(values), -1)).all(1) for values in outputs.values()], axis=0)
        if bad_N.any():
            keys = [group.samples[row].key for row in np.flatnonzero(bad_N)[:_NUM_NAMED]]
            raise ShardError(
                f"the teacher produced NaN or infinity for {int(bad_N.sum())} rows",
                code="model.not-finite",
                where=f"{self.where}, view {view}, keys {', '.join(keys)}",
                next_step="use teacher.precision=fp32, or check the weights",
            )

    def record_batch(self, group: GroupViews, position: int, view: int, outputs: TeacherOutputs) -> pa.RecordBatch:
        """The rows of one view of a group, as the part stores them."""
        row_N, box_N4 = group.row_N, group.box_VN4[position]
        embedding = self.rendering.task.embedding
        norm_N = (
            np.zeros(len(row_N)) if embedding is None else np.linalg.norm(outputs[embedding].astype(np.float64), axis=1)
        )
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
        keys, identity = [sample.key for sample in group.samples], RowIdentity(group.sample_ids, view)
        for output in with_column(self.context.header.outputs):
            columns[output.name] = encode(outputs[output.name], output, keys=keys, identity=identity)
        if PIXELS in self.schema.names:
            columns |= _stored_pixels(group, position)
        return pa.record_batch([pa.array(columns[item.name], item.type) for item in self.schema], schema=self.schema)

    def _canaries(self, group: GroupViews, position: int, view: int) -> tuple[list[bytes | None], list[bytes | None]]:
        """Digests and block means of the first ok row of the shard and of about one row in a thousand."""
        keys_N2 = sample_keys(self.context.config.views.seed, group.sample_ids)
        chosen_N = is_canary(keys_N2, np.full(len(keys_N2), view, np.int64)) | (group.row_N == self.first_row)
        pixels = group.pixels_VNCHW[position]
        digests = [pixel_digest(pixels[row]) if chosen else None for row, chosen in enumerate(chosen_N)]
        means = [pixel_mean(pixels[row]) if chosen else None for row, chosen in enumerate(chosen_N)]
        return digests, means

    def publish(self, part: Path, stored: StoredIndex, *, shard_size_bytes: int) -> Commit:
        """Publishes the part and its class sums, then their commit."""
        url, block, index, teacher = self.context.cache.url, self.task.block, stored.index, self.context.teacher
        ranges, footer = view_ranges(part, dict.fromkeys(self.rendering.view_numbers, index.num_ok))
        statuses = Counter(STATUSES[code] for code in index.status.tolist())
        commit = Commit(
            fingerprint=self.context.header.fingerprint,
            shard_id=self.shard_id,
            shard_size_bytes=shard_size_bytes,
            block=block,
            part=publish_file(url, part, layout.part_path(self.shard_id, block)),
            index=stored.ref,
            means=self._publish_sums(),
            num_ok=index.num_ok,
            read=len(index),
            written=index.num_ok,
            skipped={status: count for status, count in sorted(statuses.items()) if status != "ok"},
            views=ranges,
            footer=footer,
            statistics=self.statistics.result(),
            environment={
                **numeric_env(teacher.device, batch_size=teacher.batch_size),
                **encoder_environment(self.context.config.views),
            },
        )
        return publish_under_header(url, self.context.header, commit)

    def _publish_sums(self) -> FileRef | None:
        if self.sums is None:
            return None
        local = self.scratch / "means.parquet"
        local.write_bytes(encode_sums(self.sums))
        return publish_file(self.context.cache.url, local, layout.means_path(self.shard_id, self.task.block))


def _stored_pixels(group: GroupViews, position: int) -> dict[str, object]:
    """The columns of the stored views of one view of a group: before mixing, as JPEG or raw in H×W×C order."""
    if group.encoded_VN is not None:
        encoded_N = group.encoded_VN[position]
        return {PIXELS: encoded_N, PIXEL_HASH: np.array([*map(xxhash.xxh3_64_intdigest, encoded_N)], np.uint64)}
    raw_NW: NDArray[np.uint8] = group.pixels_VNCHW[position].permute(0, 2, 3, 1).numpy().reshape(len(group.samples), -1)
    hashes = [xxhash.xxh3_64_intdigest(raw_NW[row].data) for row in range(len(raw_NW))]
    return {PIXELS: column_of(raw_NW), PIXEL_HASH: np.array(hashes, np.uint64)}
