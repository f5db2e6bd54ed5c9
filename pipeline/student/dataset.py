"""Steps in, batches out: reads, checks, decodes and joins the rows of one rank.

A dataset over global steps, not over samples: a loader with any number of workers gives the same batches in the same
order, and resuming is starting at another step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.errors import CacheError, StillroomError
from pipeline.student.order import EpochOrder, OrderedRows, TrainingOrder
from pipeline.student.sources import RowSource, ShardRows, check_labelled, read_image
from pipeline.student.words import StoredWords, TeacherWords
from pipeline.views.options import cut_boxes, drawn_row
from pipeline.views.pixels import apply_view, stack_views
from schemas.config import Interpolation


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One rank's rows of one step; uint8 pixels, labels -1 where there is none, partners as positions in the batch."""

    step: int
    epoch: int
    num_rows_global: int
    sample_ids: list[str]
    pixels_BCHW: Tensor
    teacher_pixels_BCHW: Tensor | None
    labels_B: Tensor
    partner_B: Tensor | None
    lambda_B: Tensor | None
    cut_B4: Tensor | None
    words: tuple[TeacherWords, ...]
    """One a cache."""

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, move: Callable[[Tensor], Tensor]) -> Batch:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        moved: dict[str, Any] = {name: move(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved, words=tuple(words.map(move) for words in self.words))


@dataclass(frozen=True, slots=True)
class InputSize:
    """The square a view is resized to, in pixels, and how."""

    size: int
    interpolation: Interpolation


class StepDataset(Dataset[Batch]):
    """``dataset[step]`` is the batch of one rank at a global step, counted over all epochs.

    ``temperatures`` are those at which the losses read logits; where there is none, no logits are decoded.
    With ``needs_labels`` a row without a label is an error: found here, where labels are still on the CPU.
    """

    def __init__(
        self,
        source: RowSource,
        order: TrainingOrder,
        *,
        rank: int,
        world_size: int,
        student: InputSize,
        teacher: InputSize | None,
        max_pixels: int,
        needs_labels: bool,
        temperatures: tuple[float, ...],
    ) -> None:
        order.lanes_of(rank, world_size)
        self.source, self.order = source, order
        self.rank, self.world_size = rank, world_size
        self.student = student
        # One rendering serves both networks where they eat the same pixels.
        self.teacher = None if teacher == student else teacher
        self.max_pixels, self.needs_labels, self.temperatures = max_pixels, needs_labels, temperatures
        self._epoch: EpochOrder | None = None

    def __getitem__(self, step: int) -> Batch:
        epoch, local_step = divmod(step, self.order.num_steps)
        if self._epoch is None or self._epoch.epoch != epoch:
            self._epoch = self.order.epoch(epoch, self.source.view_of(epoch))
        rows = self._epoch.rows(local_step, self.rank, self.world_size)
        return self._batch(step, epoch, rows, self.order.global_rows(local_step))

    def _batch(self, step: int, epoch: int, rows: OrderedRows, num_rows_global: int) -> Batch:
        size = len(rows.row_B)
        joined = _Joined(size, self.temperatures)
        pixels: list[Tensor | None] = [None] * size
        teacher_pixels: list[Tensor | None] = [None] * size
        for shard in np.unique(rows.shard_B).tolist():
            where_N = np.flatnonzero(rows.shard_B == shard)
            found = self.source.rows(shard, rows.row_B[where_N], epoch)
            self._check_partners(rows, where_N, found, shard)
            if self.needs_labels:
                check_labelled(found.sample_ids, found.label_N)
            joined.put(where_N, found)
            for row, position in enumerate(where_N.tolist()):
                image = read_image(self.source, shard, found, row, max_pixels=self.max_pixels)
                pixels[position] = _render(image, found, row, self.student)
                if self.teacher is not None:
                    teacher_pixels[position] = _render(image, found, row, self.teacher)
        mixes = self.order.plan.mixes
        return Batch(
            step=step,
            epoch=epoch,
            num_rows_global=num_rows_global,
            sample_ids=joined.sample_ids,
            pixels_BCHW=_stack(pixels),
            teacher_pixels_BCHW=None if self.teacher is None else _stack(teacher_pixels),
            labels_B=torch.from_numpy(joined.label_B),
            partner_B=torch.from_numpy(rows.partner_B.astype(np.int64)) if mixes else None,
            lambda_B=torch.from_numpy(joined.lambda_B) if mixes else None,
            cut_B4=None if joined.cut_B4 is None else torch.from_numpy(joined.cut_B4),
            words=tuple(words.finish() for words in joined.words),
        )

    def _check_partners(self, rows: OrderedRows, where_N: NDArray[np.int64], found: ShardRows, shard: int) -> None:
        """The order draws partners, a cache stores them: pixels would be mixed otherwise than the teacher saw them."""
        wrong = np.flatnonzero(rows.row_B[rows.partner_B[where_N]] != found.partner_N)
        if len(wrong):
            raise CacheError(
                "the cached mixup partners are not those of the training order",
                where=f"{found.sample_ids[wrong[0]]} in shard {self.source.shard_ids[shard]}",
                next_step="the cache was made by another version of the views; build another cache",
            )


def _render(image_CHW: Tensor, rows: ShardRows, row: int, target: InputSize) -> Tensor:
    """uint8 [3,size,size]; the box is in pixels of the original, so any size shows the same crop."""
    box, flip = rows.box_N4[row].tolist(), bool(rows.flip_N[row])
    drawn = drawn_row(rows.drawn, row)
    return apply_view(image_CHW, box, flip, drawn, size=target.size, interpolation=target.interpolation)


class _Joined:
    """Columns of a batch, filled shard by shard."""

    def __init__(self, size: int, temperatures: tuple[float, ...]) -> None:
        self._temperatures = temperatures
        self.sample_ids = [""] * size
        self.label_B = np.full(size, -1, np.int64)
        self.lambda_B = np.ones(size, np.float32)
        self.cut_B4: NDArray[np.float32] | None = None
        self.words: list[_JoinedWords] = []

    def put(self, where_N: NDArray[np.int64], found: ShardRows) -> None:
        for position, sample_id in zip(where_N.tolist(), found.sample_ids, strict=True):
            self.sample_ids[position] = sample_id
        self.label_B[where_N] = found.label_N
        self.lambda_B[where_N] = found.mix_lambda_N
        cut_N4 = cut_boxes(found.drawn)
        if cut_N4 is not None:
            self.cut_B4 = np.zeros((len(self.label_B), 4), np.float32) if self.cut_B4 is None else self.cut_B4
            self.cut_B4[where_N] = cut_N4
        self.words = self.words or [_JoinedWords(len(self.label_B)) for _ in found.words]
        for words, stored in zip(self.words, found.words, strict=True):
            words.put(where_N, stored, self._temperatures)


class _JoinedWords:
    """The same for what one teacher said."""

    def __init__(self, size: int) -> None:
        self._norm_B = np.empty(size, np.float32)
        self._logits: dict[float | None, NDArray[np.float32]] = {}
        self._embedding_BD: NDArray[np.float32] | None = None

    def put(self, where_N: NDArray[np.int64], stored: StoredWords, temperatures: tuple[float, ...]) -> None:
        self._norm_B[where_N] = stored.norm_N
        for key, logits_NK in stored.dense(temperatures).items():
            self._logits[key] = self._placed(self._logits.get(key), where_N, logits_NK)
        if stored.embedding is not None:
            self._embedding_BD = self._placed(self._embedding_BD, where_N, stored.embedding.dense())

    def _placed(
        self, into: NDArray[np.float32] | None, where_N: NDArray[np.int64], rows: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Rows at their places in ``into``, which the first rows make."""
        into = np.empty((len(self._norm_B), rows.shape[1]), np.float32) if into is None else into
        into[where_N] = rows
        return into

    def finish(self) -> TeacherWords:
        logits = {key: torch.from_numpy(logits_BK) for key, logits_BK in self._logits.items()}
        embedding_BD = None if self._embedding_BD is None else torch.from_numpy(self._embedding_BD)
        return TeacherWords(logits, torch.from_numpy(self._norm_B), embedding_BD)


def _stack(pixels: list[Tensor | None]) -> Tensor:
    return stack_views([image for image in pixels if image is not None])


class _Outcomes(Dataset[Batch | StillroomError]):
    """A dataset whose errors are results.

    A loader raises what its processes raise with a traceback for a message; an error that was returned arrives as it
    was raised.
    """

    def __init__(self, dataset: StepDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, step: int) -> Batch | StillroomError:
        try:
            return self._dataset[step]
        except StillroomError as error:
            return error


def load_batches(dataset: StepDataset, steps: range, *, num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    """The batches of these steps, in order, whatever the number of loader processes.

    Raises:
        StillroomError: what the dataset raised, in whichever process, at its step.
    """
    loader = DataLoader(
        _Outcomes(dataset),
        batch_size=None,
        sampler=steps,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=2 if num_workers else None,
    )
    for outcome in loader:
        if isinstance(outcome, StillroomError):
            raise outcome
        yield outcome
