"""Rows of samples before they become a batch: one flat set of named columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.tasks.dense import HASH, OFFSET, SIZE

StructuredRows = NDArray[np.void]
_AUG_PARAMS = "aug_params/"
_BYTE_RANGE = ["offset", "size", "content_hash"]
_TARGET_RANGE = [OFFSET, SIZE, HASH]
_PIXEL_RANGE = ["pixel_offset", "pixel_size", "pixel_hash"]


def as_structured_rows(fields: Mapping[str, NDArray[Any]], aug_params: Mapping[str, NDArray[Any]]) -> StructuredRows:
    """[N] arrays, or [N, …], as the fields of one array; ``aug_params`` by ``schemas.cache_format.aug_param_columns``.

    Numbers that are read together are stored together: a step takes few rows of many shards, and pays for each array
    it touches.
    """
    named = {**fields, **{_AUG_PARAMS + name: values_N for name, values_N in aug_params.items()}}
    num_rows = len(next(iter(named.values())))
    rows_N = np.empty(num_rows, [(name, values.dtype, values.shape[1:]) for name, values in named.items()])
    for name, values in named.items():
        rows_N[name] = values
    return rows_N


def is_aug_param(field: str) -> bool:
    return field.startswith(_AUG_PARAMS)


def aug_params_of(rows_N: StructuredRows) -> dict[str, NDArray[Any]]:
    """The ``aug_params`` of ``as_structured_rows``."""
    names = rows_N.dtype.names or ()
    return {name.removeprefix(_AUG_PARAMS): rows_N[name] for name in names if is_aug_param(name)}


@dataclass(frozen=True, slots=True)
class SampleRows:
    """N rows under one view: where their bytes are, how they are cropped, and the encoded outputs of cached teachers.

    Attributes:
        sample_id_N: str objects.
        rows_N: with the fields offset, size, content_hash (of the image's bytes in its shard), the task's target
            columns, width, height (pixels after EXIF rotation), box [4], flip, mix_lambda, partner (ordinal among the
            shard's ok rows; a row's own where it is not mixed), augmentation parameters, and possibly others; of a
            cache with stored views pixel_offset, pixel_size (in its file) and pixel_hash (of these bytes).
        teachers: columns of each cached teacher: ``norm`` (fp32, of the embedding), and by name the outputs that
            losses read (uint8 [N,W], encoded).
    """

    sample_id_N: NDArray[np.object_]
    rows_N: StructuredRows
    teachers: Sequence[Mapping[str, NDArray[Any]]] = ()

    def __len__(self) -> int:
        return len(self.rows_N)

    @property
    def sample_ids(self) -> list[str]:
        return self.sample_id_N.tolist()

    @property
    def byte_ranges(self) -> list[tuple[int, int, int]]:
        """Offset and size in bytes in the shard, and content hash, of each row's image."""
        return self.rows_N[_BYTE_RANGE].tolist()

    @property
    def target_ranges(self) -> list[tuple[int, int, int]]:
        """Offset and size in bytes in the shard, and content hash, of each row's mask or boxes; offset -1: it has none.
        Of tasks with a ``view_target``."""
        return self.rows_N[_TARGET_RANGE].tolist()

    @property
    def pixel_ranges(self) -> list[tuple[int, int, int]]:
        """Offset and size in bytes in the file of the view, and hash, of each row's stored view."""
        return self.rows_N[_PIXEL_RANGE].tolist()

    @property
    def aug_params(self) -> dict[str, NDArray[Any]]:
        return aug_params_of(self.rows_N)


def scatter(chunks: Sequence[SampleRows], positions: Sequence[NDArray[np.integer[Any]]]) -> SampleRows:
    """The rows of several shards as those of one batch.

    Args:
        chunks: with the same columns each.
        positions: of each chunk's rows in the batch; together they are 0 … B - 1.
    """
    num_rows = sum(map(len, positions))

    def scattered(columns: Sequence[NDArray[Any]]) -> NDArray[Any]:
        batch = np.empty((num_rows, *columns[0].shape[1:]), columns[0].dtype)
        for values, position_N in zip(columns, positions, strict=True):
            batch[position_N] = values
        return batch

    teachers = zip(*(chunk.teachers for chunk in chunks), strict=True)
    return SampleRows(
        scattered([chunk.sample_id_N for chunk in chunks]),
        scattered([chunk.rows_N for chunk in chunks]),
        [{name: scattered([chunk[name] for chunk in teacher]) for name in teacher[0]} for teacher in teachers],
    )
