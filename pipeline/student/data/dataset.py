"""Steps in, batches out: reads, checks, decodes and joins the rows of one rank.

A dataset over global steps, not over samples: a loader with any number of workers gives the same batches in the same
order, and resuming is starting at another step.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from pipeline.augment.options import aug_params_row, cutmix_boxes
from pipeline.augment.params import sample_views
from pipeline.augment.pixels import apply_view, stack_views
from pipeline.core.errors import CacheError, StillroomError, TrainingError, first_line
from pipeline.student.data.batch_summary import Summarised
from pipeline.student.data.loader import Prefetcher
from pipeline.student.data.order import EpochOrder, OrderedRows, TrainingOrder
from pipeline.student.data.rows import SampleRows
from pipeline.student.data.sources import RowSource, check_labelled, read_image
from pipeline.student.data.teacher_outputs import EncodedTeacherOutputs, TeacherOutputs
from schemas.config import Interpolation, ViewsConfig

# Batches that each loader process holds ready.
PREFETCH_FACTOR = 2
_ALIGNED_BYTES = 64


@dataclass(frozen=True, slots=True)
class InputSize:
    """The square a view is resized to, in pixels, and how."""

    size: int
    interpolation: Interpolation


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Batch(Summarised):
    """One rank's rows of one step; uint8 pixels, labels -1 where there is none, partners as positions in the batch."""

    step: int
    epoch: int
    num_rows_global: int
    sample_ids: list[str]
    pixels_BCHW: Tensor
    teacher_pixels: Mapping[InputSize, Tensor]
    """[B,C,H,W] for the teachers online who eat other pixels than the student, by what they eat."""
    labels_B: Tensor
    partner_B: Tensor | None
    lambda_B: Tensor | None
    cutmix_box_B4: Tensor | None
    words: tuple[TeacherOutputs, ...]
    """One a cache."""

    def to(self, device: torch.device) -> Batch:
        return self.map_columns(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self.map_columns(lambda tensor: tensor.pin_memory())

    def map_columns(self, move: Callable[[Any], Any]) -> Batch:
        """The same, with ``move`` applied to every column, those of teachers too."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        moved = {name: move(value) for name, value in values.items() if isinstance(value, Tensor | _TensorSpec)}
        pixels = {size: move(pixels_BCHW) for size, pixels_BCHW in self.teacher_pixels.items()}
        return replace(self, **moved, teacher_pixels=pixels, words=tuple(words.map(move) for words in self.words))


class StepDataset(Dataset[Batch]):
    """``dataset[step]`` is the batch of one rank at a global step, counted over all epochs.

    ``teachers`` says what those eat who are asked online about the same views.
    ``student_views`` is the plan of a student that sees other views than its teacher, a new one each epoch.
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
        max_pixels: int,
        needs_labels: bool,
        temperatures: tuple[float, ...],
        teachers: Sequence[InputSize] = (),
        student_views: ViewsConfig | None = None,
    ) -> None:
        order.lanes_of(rank, world_size)
        self.source, self.order = source, order
        self.rank, self.world_size = rank, world_size
        self.student, self.student_views = student, student_views
        # One rendering serves all networks that eat the same pixels.
        shared = () if student_views is not None else (student,)
        self.teachers = tuple(size for size in dict.fromkeys(teachers) if size not in shared)
        self.max_pixels, self.needs_labels, self.temperatures = max_pixels, needs_labels, temperatures
        self._epoch: EpochOrder | None = None

    def __getitem__(self, step: int) -> Batch:
        epoch, local_step = divmod(step, self.order.num_steps)
        if self._epoch is None or self._epoch.epoch != epoch:
            self._epoch = self.order.epoch(epoch, self.source.view_of(epoch))
        rows = self._epoch.rows(local_step, self.rank, self.world_size)
        return self._batch(step, epoch, rows, self.order.global_rows(local_step))

    def _batch(self, step: int, epoch: int, rows: OrderedRows, num_rows_global: int) -> Batch:
        joined = join_step(self.source, rows, epoch)
        record_B, label_B = joined.rows.rows_N, joined.rows.rows_N["label"].astype(np.int64)
        self._check(rows, joined.rows, label_B)
        pixels, teacher_pixels = self._pixels(joined, epoch)
        mixes = self.order.plan.mixes
        batch = Batch(
            step=step,
            epoch=epoch,
            num_rows_global=num_rows_global,
            sample_ids=joined.rows.sample_ids,
            pixels_BCHW=torch.empty(0),
            teacher_pixels={size: _stack(views) for size, views in teacher_pixels.items()},
            labels_B=torch.from_numpy(label_B),
            partner_B=torch.from_numpy(rows.partner_B.astype(np.int64)) if mixes else None,
            lambda_B=torch.from_numpy(record_B["mix_lambda"].copy()) if mixes else None,
            cutmix_box_B4=None
            if (cutmix_box_B4 := cutmix_boxes(joined.rows.drawn)) is None
            else torch.from_numpy(cutmix_box_B4),
            words=tuple(_decoded(stored, self.temperatures) for stored in joined.rows.words),
        )
        # Last, since in a loader's process they are stacked into the memory in which all of the batch will travel.
        room = None if get_worker_info() is None else _SharedMemoryBatch.room_of(batch)
        return replace(batch, pixels_BCHW=_stack(pixels, room=room))

    def _check(self, ordered: OrderedRows, rows: SampleRows, label_B: NDArray[np.int64]) -> None:
        """The order draws partners, a cache stores them: pixels would be mixed otherwise than the teacher saw them."""
        wrong = np.flatnonzero(ordered.row_B[ordered.partner_B] != rows.rows_N["partner"])
        if len(wrong):
            raise CacheError(
                "the cached mixup partners are not those of the training order",
                where=rows.sample_ids[wrong[0]],
                next_step="the cache was made by another version of the views; build another cache",
            )
        if self.needs_labels:
            check_labelled(rows.sample_ids, label_B)

    def _pixels(
        self, joined: JoinedStep, epoch: int
    ) -> tuple[list[Tensor | None], dict[InputSize, list[Tensor | None]]]:
        """Of each row for the student, and for teachers who take others; each image is read and decoded once."""
        rows, size = joined.rows, len(joined.rows)
        pixels: list[Tensor | None] = [None] * size
        teacher_pixels: dict[InputSize, list[Tensor | None]] = {eaten: [None] * size for eaten in self.teachers}
        theirs, places = _RowViews.of(rows), rows.places
        own = theirs if self.student_views is None else _RowViews.drawn_anew(rows, self.student_views, epoch)
        for shard, row_N in joined.of_shards:
            for row in row_N.tolist():
                sample_id = rows.sample_ids[row]
                image = read_image(self.source, shard, places[row], sample_id=sample_id, max_pixels=self.max_pixels)
                pixels[row] = own.render(image, row, self.student)
                for eaten, views in teacher_pixels.items():
                    views[row] = theirs.render(image, row, eaten)
        return pixels, teacher_pixels


@dataclass(frozen=True, slots=True)
class _RowViews:
    """Views of rows, as lists: to take a number out of an array costs as much as the hash of a small image."""

    boxes: list[list[int]]
    flips: list[bool]
    drawn: Mapping[str, NDArray[Any]]

    @classmethod
    def of(cls, rows: SampleRows) -> _RowViews:
        return cls(rows.rows_N["box"].tolist(), rows.rows_N["flip"].tolist(), rows.drawn)

    @classmethod
    def drawn_anew(cls, rows: SampleRows, plan: ViewsConfig, view: int) -> _RowViews:
        """Of the same rows, a view of another plan, which mixes nothing."""
        params = sample_views(plan, rows.sample_ids, view, rows.rows_N["width"], rows.rows_N["height"])
        return cls(params.box_N4.tolist(), params.flip_N.tolist(), params.aug_params)

    def render(self, image_CHW: Tensor, row: int, target: InputSize) -> Tensor:
        """uint8 [3,size,size]; the box is in pixels of the original, so any size shows the same crop."""
        box, flip, drawn = self.boxes[row], self.flips[row], aug_params_row(self.drawn, row)
        return apply_view(image_CHW, box, flip, drawn, size=target.size, interpolation=target.interpolation)


@dataclass(frozen=True, slots=True)
class JoinedStep:
    """The rows of a batch, and which of them each shard has."""

    rows: SampleRows
    of_shards: list[tuple[int, NDArray[np.int64]]]


def join_step(source: RowSource, ordered: OrderedRows, epoch: int) -> JoinedStep:
    """What is known of the rows of a step before their images are read."""
    by_shard = np.argsort(ordered.shard_B, kind="stable")
    starts = np.flatnonzero(np.diff(ordered.shard_B[by_shard], prepend=-1))
    of_shards = [(int(ordered.shard_B[row_N[0]]), row_N) for row_N in np.split(by_shard, starts[1:])]
    pieces = [(row_N, source.rows(shard, ordered.row_B[row_N], epoch)) for shard, row_N in of_shards]
    return JoinedStep(SampleRows.placed(pieces, len(ordered.row_B)), of_shards)


def _decoded(stored: EncodedTeacherOutputs, temperatures: tuple[float, ...]) -> TeacherOutputs:
    """For the whole batch at once, since a step takes few rows of many shards."""
    logits = {key: torch.from_numpy(logits_BK) for key, logits_BK in stored.dense(temperatures).items()}
    embedding_BD = None if stored.embedding is None else torch.from_numpy(stored.embedding.dense())
    return TeacherOutputs(logits, torch.from_numpy(stored.norm_N), embedding_BD)


def _stack(pixels: list[Tensor | None], *, room: int | None = None) -> Tensor:
    return stack_views([image for image in pixels if image is not None], spare_bytes=room)


@dataclass(frozen=True, slots=True)
class _TensorSpec:
    """Where a tensor lies in the memory of a parcel, and how."""

    first_byte: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def tensor(self, block: torch.UntypedStorage) -> Tensor:
        first = self.first_byte // self.dtype.itemsize
        return torch.empty(0, dtype=self.dtype).set_(block, first, self.shape, self.stride)  # pyright: ignore[reportCallIssue, reportArgumentType]


@dataclass(frozen=True, slots=True)
class _SharedMemoryBatch:
    """A batch between two processes, in one block of shared memory: the student's pixels, and behind them all else.

    For each block the receiver has to connect to the sender, and what goes in the message itself is copied through a
    pipe.
    """

    pixels_BCHW: Tensor
    columns: Batch
    """With slots in place of tensors."""

    @staticmethod
    def room_of(batch: Batch) -> int:
        """Bytes that all but the pixels take."""
        sizes: list[int] = []
        batch.map_columns(lambda tensor: sizes.append(_aligned(tensor.nbytes)))
        return sum(sizes) + _ALIGNED_BYTES

    @classmethod
    def of(cls, batch: Batch) -> _SharedMemoryBatch:
        block, end = batch.pixels_BCHW.untyped_storage(), batch.pixels_BCHW.nbytes

        def put(tensor: Tensor) -> _TensorSpec:
            nonlocal end
            slot = _TensorSpec(_aligned(end), tensor.dtype, tensor.shape, tensor.stride())
            end = slot.first_byte + tensor.nbytes
            slot.tensor(block).copy_(tensor)
            return slot

        return cls(batch.pixels_BCHW, replace(batch, pixels_BCHW=torch.empty(0)).map_columns(put))

    def open(self) -> Batch:
        block = self.pixels_BCHW.untyped_storage()
        return replace(self.columns.map_columns(lambda slot: slot.tensor(block)), pixels_BCHW=self.pixels_BCHW)

    def pin_memory(self) -> Batch:
        """Called by a ``DataLoader`` that is told to pin."""
        return self.open().pin_memory()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNED_BYTES) * _ALIGNED_BYTES


class _ErrorCapturingDataset(Dataset[Batch | _SharedMemoryBatch | StillroomError]):
    """A dataset whose errors are results.

    A loader raises what its processes raise with a traceback for a message; an error that was returned arrives as it
    was raised.
    """

    def __init__(self, dataset: StepDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, step: int) -> Batch | _SharedMemoryBatch | StillroomError:
        try:
            batch = self._dataset[step]
        except StillroomError as error:
            return error
        except RuntimeError as error:
            # torch's own, without a class: other programs have taken what was free at the start.
            if "shared memory" not in str(error):
                raise
            return TrainingError(
                "a loader process could not get shared memory for its batch",
                code="train.shared-memory",
                where="train.num_workers",
                got=first_line(error),
                next_step="lower train.num_workers (0 needs none), or enlarge /dev/shm; then run the command again: it "
                "continues from the last checkpoint",
            )
        return batch if get_worker_info() is None else _SharedMemoryBatch.of(batch)


def load_batches(dataset: StepDataset, steps: range, *, num_workers: int, pin_memory: bool) -> Generator[Batch]:
    """The batches of these steps, in order, whatever the number of loader processes.

    Close it where not all are taken: it waits for threads, which a garbage collector must not do. That may run in a
    thread that is just starting, under a lock that these need to end.

    Raises:
        StillroomError: what the dataset raised, in whichever process, at its step.
    """
    loader = DataLoader(
        _ErrorCapturingDataset(dataset),
        batch_size=None,
        sampler=steps,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=PREFETCH_FACTOR if num_workers else None,
    )
    outcomes = iter(loader)
    ahead = Prefetcher(dataset.source, dataset.order, rank=dataset.rank, world_size=dataset.world_size, steps=steps)
    with ahead:
        try:
            for outcome in outcomes:
                if isinstance(outcome, StillroomError):
                    raise outcome
                batch = outcome.open() if isinstance(outcome, _SharedMemoryBatch) else outcome
                ahead.advance(batch.step)
                yield batch
        finally:
            # Collected later, with an error's traceback, it would wait 5 s for each loader process.
            del outcomes
