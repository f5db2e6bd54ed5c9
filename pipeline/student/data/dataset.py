"""Builds the batches of one rank: reads, checks, decodes and joins the rows of a step.

A dataset over global steps, not over samples: a loader with any number of workers gives the same batches in the same
order, and resuming is starting at another step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from pipeline.augment.options import aug_params_row, cutmix_boxes
from pipeline.augment.params import sample_views
from pipeline.augment.pixels import stack_views
from pipeline.augment.stored_pixels import render_view
from pipeline.core.errors import CacheError
from pipeline.student.data.batch import Batch, InputSize, SharedMemoryBatch
from pipeline.student.data.epoch_order import EpochOrder, OrderedRows
from pipeline.student.data.order import TrainingOrder
from pipeline.student.data.rows import SampleRows, scatter
from pipeline.student.data.sources import RowSource, check_labelled
from pipeline.student.data.teacher_outputs import decode_outputs
from pipeline.tasks import DOMAIN, Targets
from schemas.config import ViewsConfig


class StepDataset(Dataset[Batch]):
    """``dataset[step]`` is the batch of one rank at a global step, counted over all epochs.

    Args:
        teachers: input sizes of the online teachers, which take the same views.
        student_views: the plan of a student whose views differ from its teacher's; they do not repeat.
        required_targets: columns in which a row without a target is an error, raised here, where targets are still on
            the CPU.
    """

    def __init__(
        self,
        source: RowSource,
        order: TrainingOrder,
        *,
        rank: int,
        world_size: int,
        student: InputSize,
        max_pixels: int,
        required_targets: Sequence[str] = (),
        teachers: Sequence[InputSize] = (),
        student_views: ViewsConfig | None = None,
    ) -> None:
        order.lanes_of(rank, world_size)
        self.source, self.order = source, order
        self.rank, self.world_size = rank, world_size
        self.student = student
        self.student_views = student_views and student_views.model_copy(update={"size": student.size})
        # All networks with the same input share one rendering.
        shared = () if student_views is not None else (student,)
        self.teachers = tuple(size for size in dict.fromkeys(teachers) if size not in shared)
        self.max_pixels, self.required_targets = max_pixels, tuple(required_targets)
        self._epoch: EpochOrder | None = None

    def __getitem__(self, step: int) -> Batch:
        epoch, local_step = divmod(step, self.order.num_steps)
        if self._epoch is None or self._epoch.epoch != epoch:
            self._epoch = self.order.epoch(epoch, self.source.view_of(self.order.views(epoch)[0]))
        rows = self._epoch.rows(local_step, self.rank, self.world_size)
        return self._batch(step, epoch, rows, self.order.global_rows(local_step))

    def _batch(self, step: int, epoch: int, ordered: OrderedRows, num_rows_global: int) -> Batch:
        by_shard, views = group_by_shard(ordered), self.order.views(epoch)
        rows = read_rows(self.source, ordered, by_shard, views)
        targets = {
            column.name: rows.rows_N[column.name] for column in self.source.task.columns if column.name != DOMAIN
        }
        self._check(ordered, rows, targets)
        pixels, teacher_pixels = self._pixels(rows, by_shard, views[0] + ordered.view_B.astype(np.int64))
        mixes = self.order.plan.mixes
        cutmix_box_B4 = cutmix_boxes(rows.aug_params)
        batch = Batch(
            step=step,
            epoch=epoch,
            num_rows_global=num_rows_global,
            sample_ids=rows.sample_ids,
            pixels_BCHW=torch.empty(0),
            teacher_pixels={size: _stack(views) for size, views in teacher_pixels.items()},
            targets={name: torch.from_numpy(values_B.astype(np.int64)) for name, values_B in targets.items()},
            partner_B=torch.from_numpy(ordered.partner_B.astype(np.int64)) if mixes else None,
            lambda_B=torch.from_numpy(rows.rows_N["mix_lambda"].copy()) if mixes else None,
            cutmix_box_B4=None if cutmix_box_B4 is None else torch.from_numpy(cutmix_box_B4),
            teacher_outputs=tuple(
                decode_outputs(columns, outputs, self.source.reads, head)
                for columns, outputs, head in zip(rows.teachers, self.source.outputs, self.source.heads, strict=True)
            ),
        )
        # Last: a loader process stacks them into the shared memory in which the whole batch travels.
        spare_bytes = None if get_worker_info() is None else SharedMemoryBatch.extra_bytes(batch)
        return replace(batch, pixels_BCHW=_stack(pixels, spare_bytes=spare_bytes))

    def _check(self, ordered: OrderedRows, rows: SampleRows, targets: Targets) -> None:
        """The order computes partners and a cache stores them; they must be equal."""
        wrong = np.flatnonzero(ordered.row_B[ordered.partner_B] != rows.rows_N["partner"])
        if len(wrong):
            raise CacheError(
                "the cached mixup partners are not those of the training order",
                code="cache.partner-mismatch",
                where=rows.sample_ids[wrong[0]],
                next_step="the cache was built by another version of the views; build another cache",
            )
        if self.required_targets:
            check_labelled(rows.sample_ids, self.source.task, targets, self.required_targets)

    def _pixels(
        self, rows: SampleRows, by_shard: ByShard, view_B: NDArray[np.int64]
    ) -> tuple[list[Tensor | None], dict[InputSize, list[Tensor | None]]]:
        """The views of each row, for the student and for teachers with another input; each image is decoded once."""
        if self.source.stores_views:
            return self._stored_views(rows, by_shard, view_B), {}
        pixels: list[Tensor | None] = [None] * len(rows)
        teacher_pixels: dict[InputSize, list[Tensor | None]] = {size: [None] * len(rows) for size in self.teachers}
        teacher_views, byte_ranges, sample_ids = _RowViews.of(rows, self.order.plan), rows.byte_ranges, rows.sample_ids
        student_views = (
            teacher_views if self.student_views is None else _RowViews.sampled(rows, self.student_views, view_B)
        )
        quality = self.order.plan.jpeg_quality
        for shard, position_N in by_shard:
            decoded, image = None, torch.empty(0)
            for row in position_N.tolist():
                if byte_ranges[row] != decoded:
                    decoded = byte_ranges[row]
                    image = self.source.files.image(
                        shard, decoded, sample_id=sample_ids[row], max_pixels=self.max_pixels
                    )
                pixels[row] = student_views.render(image, row, self.student, quality)
                for size, views in teacher_pixels.items():
                    views[row] = teacher_views.render(image, row, size, quality)
        return pixels, teacher_pixels

    def _stored_views(self, rows: SampleRows, by_shard: ByShard, view_B: NDArray[np.int64]) -> list[Tensor | None]:
        """The views that the cache stores, at the size of all networks."""
        pixels: list[Tensor | None] = [None] * len(rows)
        byte_ranges, sample_ids, numbers = rows.pixel_ranges, rows.sample_ids, view_B.tolist()
        for shard, position_N in by_shard:
            for row in position_N.tolist():
                pixels[row] = self.source.stored_view(shard, numbers[row], byte_ranges[row], sample_id=sample_ids[row])
        return pixels


@dataclass(frozen=True, slots=True)
class _RowViews:
    """Views of rows, as lists: to take a number out of an array costs as much as the hash of a small image."""

    boxes: list[list[int]]
    flips: list[bool]
    aug_params: Mapping[str, NDArray[Any]]
    fill: tuple[int, int, int]

    @classmethod
    def of(cls, rows: SampleRows, plan: ViewsConfig) -> _RowViews:
        return cls(rows.rows_N["box"].tolist(), rows.rows_N["flip"].tolist(), rows.aug_params, plan.fill)

    @classmethod
    def sampled(cls, rows: SampleRows, plan: ViewsConfig, view_B: NDArray[np.int64]) -> _RowViews:
        """These views of another plan, which mixes nothing, for the same rows."""
        params = sample_views(plan, rows.sample_ids, view_B, rows.rows_N["width"], rows.rows_N["height"])
        return cls(params.box_N4.tolist(), params.flip_N.tolist(), params.aug_params, plan.fill)

    def render(self, image_CHW: Tensor, row: int, target: InputSize, quality: int | None) -> Tensor:
        """uint8 [3,H,W]; the box is in pixels of the original, so any size shows the same crop."""
        box, flip, aug_params = self.boxes[row], self.flips[row], aug_params_row(self.aug_params, row)
        return render_view(
            image_CHW,
            box,
            flip,
            aug_params,
            quality=quality,
            size=target.size,
            interpolation=target.interpolation,
            fill=self.fill,
        )[0]


ByShard = list[tuple[int, NDArray[np.int64]]]
"""Shards by their position in the order, each with the positions of its rows in the batch, image by image."""


def group_by_shard(ordered: OrderedRows) -> ByShard:
    """A batch's rows, by the shard that they are read from."""
    position_B = np.lexsort((ordered.row_B, ordered.shard_B))
    starts = np.flatnonzero(np.diff(ordered.shard_B[position_B], prepend=-1))
    return [(int(ordered.shard_B[position_N[0]]), position_N) for position_N in np.split(position_B, starts[1:])]


def read_rows(source: RowSource, ordered: OrderedRows, by_shard: ByShard, views: Sequence[int]) -> SampleRows:
    """The rows of a batch, in its order, before their images are read.

    Args:
        views: those that the epoch shows, ``TrainingOrder.views``.
    """
    if len(views) == 1:
        chunks = [source.rows(shard, ordered.row_B[position_N], views[0]) for shard, position_N in by_shard]
        return scatter(chunks, [position_N for _, position_N in by_shard])
    view_B = views[0] + ordered.view_B.astype(np.int64)
    placed = [
        (chunk, position_N[at])
        for shard, position_N in by_shard
        for chunk, at in source.rows_of_views(shard, ordered.row_B[position_N], view_B[position_N])
    ]
    return scatter([chunk for chunk, _ in placed], [position_M for _, position_M in placed])


def _stack(pixels: list[Tensor | None], *, spare_bytes: int | None = None) -> Tensor:
    return stack_views([image for image in pixels if image is not None], spare_bytes=spare_bytes)
