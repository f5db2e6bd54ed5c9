"""The batch of one rank in one step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.student.data.batch_summary import Summarised
from pipeline.student.data.teacher_outputs import TeacherOutputs
from schemas.config import Interpolation, Size

_ALIGNED_BYTES = 64


@dataclass(frozen=True, slots=True)
class InputSize:
    """An input, in pixels, and the interpolation that resizes a view to it."""

    size: Size
    interpolation: Interpolation


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Batch(Summarised):
    """B rows.

    Attributes:
        step, epoch: the global step, counted over all epochs, and its epoch.
        num_rows_global: rows of the step over all ranks.
        sample_ids: ``shard_id/key``.
        pixels_BCHW: uint8, of the student's views; not mixed yet.
        teacher_pixels: uint8 [B,C,H,W] for online teachers whose input differs from the student's.
        targets: int64 [B] by the name of the task's column.
        partner_B: int64; position in the batch of the mixup partner, a row's own where it is not mixed. None: the views
            are not mixed, nor have they ``lambda_B``.
        lambda_B: fp32; a row's own share of its mixed pixels.
        cutmix_box_B4: fp32; see ``pipeline.augment.options.cutmix_boxes``. None: the views have none.
        teacher_outputs: of each cache.
    """

    step: int
    epoch: int
    num_rows_global: int
    sample_ids: list[str]
    pixels_BCHW: Tensor
    teacher_pixels: Mapping[InputSize, Tensor]
    targets: Mapping[str, Tensor]
    partner_B: Tensor | None
    lambda_B: Tensor | None
    cutmix_box_B4: Tensor | None
    teacher_outputs: tuple[TeacherOutputs, ...]

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.sample_ids)

    def to(self, device: torch.device) -> Batch:
        return self.map_columns(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self.map_columns(lambda tensor: tensor.pin_memory())

    def map_columns(self, function: Callable[[Any], Any]) -> Batch:
        """Applies a function to every tensor, those of teachers included."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        columns = {name: function(value) for name, value in values.items() if isinstance(value, Tensor | TensorSpec)}
        pixels = {size: function(pixels_BCHW) for size, pixels_BCHW in self.teacher_pixels.items()}
        targets = {name: function(target_B) for name, target_B in self.targets.items()}
        outputs = tuple(outputs.map(function) for outputs in self.teacher_outputs)
        return replace(self, **columns, teacher_pixels=pixels, targets=targets, teacher_outputs=outputs)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor in a block of memory: its first byte and its layout."""

    first_byte: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def tensor(self, block: torch.UntypedStorage) -> Tensor:
        first = self.first_byte // self.dtype.itemsize
        return torch.empty(0, dtype=self.dtype).set_(block, first, self.shape, self.stride)  # pyright: ignore[reportCallIssue, reportArgumentType]


@dataclass(frozen=True, slots=True)
class SharedMemoryBatch:
    """A batch that travels between two processes in one block of shared memory: the student's pixels, then the rest.

    For each block the receiver connects to the sender, and a tensor in the message itself is copied through a pipe.

    Attributes:
        columns: the batch with a ``TensorSpec`` in place of each other tensor.
    """

    pixels_BCHW: Tensor
    columns: Batch

    @staticmethod
    def extra_bytes(batch: Batch) -> int:
        """Bytes that all but the pixels take."""
        sizes: list[int] = []
        batch.map_columns(lambda tensor: sizes.append(_aligned(tensor.nbytes)))
        return sum(sizes) + _ALIGNED_BYTES

    @classmethod
    def of(cls, batch: Batch) -> SharedMemoryBatch:
        """The storage of the pixels must have ``extra_bytes`` behind them."""
        block, end = batch.pixels_BCHW.untyped_storage(), batch.pixels_BCHW.nbytes

        def put(tensor: Tensor) -> TensorSpec:
            nonlocal end
            spec = TensorSpec(_aligned(end), tensor.dtype, tensor.shape, tensor.stride())
            end = spec.first_byte + tensor.nbytes
            spec.tensor(block).copy_(tensor)
            return spec

        return cls(batch.pixels_BCHW, replace(batch, pixels_BCHW=torch.empty(0)).map_columns(put))

    def open(self) -> Batch:
        block = self.pixels_BCHW.untyped_storage()
        return replace(self.columns.map_columns(lambda spec: spec.tensor(block)), pixels_BCHW=self.pixels_BCHW)

    def pin_memory(self) -> Batch:
        """A ``DataLoader`` with ``pin_memory=True`` calls it."""
        return self.open().pin_memory()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNED_BYTES) * _ALIGNED_BYTES
