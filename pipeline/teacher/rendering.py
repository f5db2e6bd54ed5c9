"""From a shard to mix groups of rendered views. Each image is decoded once for all views of a block.

Memory holds mix group x views of a block, never the rows of a shard: each view is rendered into the group's buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from pipeline.augment.options import aug_params_row, cutmix_boxes
from pipeline.augment.params import (
    EVAL_VIEW,
    ViewParams,
    eval_params,
    mix_partners,
    sample_keys,
    unmix,
    view_params,
)
from pipeline.augment.stored_pixels import render_view
from pipeline.core.errors import ShardError
from pipeline.core.hashing import differences
from pipeline.models import InputSpec
from pipeline.shards.decode import BadImageError, BadStatus, decode, image_size
from pipeline.shards.index import STATUSES, IndexBuilder, ShardIndex
from pipeline.shards.tar import Sample, TarNotes, read_samples
from pipeline.tasks import Targets, Task, task_of
from schemas.cache_format import Status, ViewBlock
from schemas.config import DataConfig, Interpolation, Size, ViewsConfig, height_width

_STATUSES_AFTER_DECODING = ("ok", *get_args(BadStatus), "bad_target")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """The views of a shard's images to render.

    Attributes:
        size: of the views in pixels.
        task: that of the samples' targets.
        max_pixels: of an image; a larger one is not decoded.
    """

    shard_id: str
    plan: ViewsConfig
    block: ViewBlock
    size: Size
    interpolation: Interpolation
    task: Task
    max_pixels: int

    @classmethod
    def of(cls, shard_id: str, plan: ViewsConfig, block: ViewBlock, spec: InputSpec, data: DataConfig) -> Rendering:
        """For a network with this input, and samples that are read by this config."""
        return cls(
            shard_id=shard_id,
            plan=plan,
            block=block,
            size=spec.size,
            interpolation=spec.interpolation,
            task=task_of(data).of_shard(shard_id),
            max_pixels=data.max_pixels,
        )

    @property
    def jpeg_quality(self) -> int | None:
        """Of the JPEGs that the views are decoded from; None: they are not encoded, like those of the eval pass."""
        return None if self.block.is_eval else self.plan.jpeg_quality

    @property
    def view_numbers(self) -> list[int]:
        return [EVAL_VIEW] if self.block.is_eval else list(self.block.views)


class Mixing(NamedTuple):
    """How N rows are mixed: arguments of ``to_input``. Without boxes, all rows are blended."""

    partner_N: NDArray[np.int32]
    lambda_N: NDArray[np.float32]
    cutmix_box_N4: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupViews:
    """One mix group: N consecutive ok rows of a shard under the V views of a block.

    Attributes:
        pixels_VNCHW: what the networks see, before mixing.
        encoded_VN: the same pixels as JPEG, of a plan that encodes with loss.
        view_targets_VN: the targets of the views by the task's name for them, of tasks that have such.
    """

    shard_id: str
    samples: list[Sample]
    row_N: NDArray[np.int32]
    content_hash_N: NDArray[np.uint64]
    targets: Targets
    box_VN4: NDArray[np.int32]
    flip_VN: NDArray[np.bool_]
    partner_VN: NDArray[np.int32]
    mix_lambda_VN: NDArray[np.float32]
    aug_params_VN: dict[str, NDArray[Any]]
    pixels_VNCHW: Tensor
    encoded_VN: list[list[bytes]] | None = None
    view_targets_VN: Mapping[str, NDArray[Any]] = field(default_factory=dict[str, NDArray[Any]])

    def targets_of(self, position: int) -> Targets:
        """Targets of the samples, and of their views at this position."""
        return {**self.targets, **{name: values_VN[position] for name, values_VN in self.view_targets_VN.items()}}

    @property
    def mixes(self) -> bool:
        return bool((self.mix_lambda_VN != 1).any())

    @property
    def mixing(self) -> list[Mixing | None]:
        """How the rows of each view are mixed; None if no row of the group is."""
        if not self.mixes:
            return [None] * len(self.pixels_VNCHW)
        columns = [self.partner_VN, self.mix_lambda_VN, cutmix_boxes(self.aug_params_VN)]
        return [Mixing(*view) for view in zip(*(column for column in columns if column is not None), strict=True)]

    @property
    def sample_ids(self) -> list[str]:
        return [f"{self.shard_id}/{sample.key}" for sample in self.samples]


@dataclass(frozen=True, slots=True)
class _Rendered:
    """The status of one candidate; width and height in pixels, 0 unless ok; its views as JPEG, if they are encoded, and
    their targets, if views have such."""

    status: Status
    width: int = 0
    height: int = 0
    reason: str | None = None
    encoded_V: tuple[bytes, ...] = ()
    targets_V: tuple[NDArray[Any], ...] = ()


class _Row(NamedTuple):
    """A candidate that decodes."""

    sample: Sample
    params: ViewParams
    encoded_V: tuple[bytes, ...]
    targets_V: tuple[NDArray[Any], ...]


def indexed_samples(
    path: Path, index: ShardIndex, data: DataConfig, *, where: str, notes: TarNotes | None = None
) -> Iterator[Sample]:
    """The ok samples of an indexed shard, in tar order. Reads the whole tar and compares each sample to its index row.

    Raises:
        ShardError: the tar differs from the indexed one, or is damaged.
    """
    keys, num_read = index.keys.to_pylist(), 0
    for sample in read_samples(path, data, where=where, rules=index.member_rules, notes=notes):
        num_read += 1
        if num_read > len(index):
            raise _changed_shard_error(where, got=f"a sample {sample.key!r} beyond the {len(index)} indexed")
        _check_indexed(sample, index, keys[sample.row], where)
        if index.status[sample.row] == STATUSES.index("ok"):
            yield sample
    if num_read < len(index):
        raise _changed_shard_error(where, got=f"{num_read} samples", expected=f"{len(index)}")


def _check_indexed(sample: Sample, index: ShardIndex, key: str, where: str) -> None:
    row, status = sample.row, STATUSES[index.status[sample.row]]
    indexed = {
        "key": key,
        **{name: values[row : row + 1].tolist()[0] for name, values in index.targets.items()},
        "offset": int(index.offset[row]),
        "size": int(index.size[row]),
        "content_hash": int(index.content_hash[row]),
        # The tar alone does not show whether an image can be decoded.
        "status": "ok" if sample.status == "ok" and status in _STATUSES_AFTER_DECODING else status,
    }
    actual = {
        "key": sample.key,
        **{name: values.tolist()[0] for name, values in index.task.rows([sample.target]).items()},
        "offset": sample.offset,
        "size": sample.size,
        "content_hash": xxhash.xxh3_64_intdigest(sample.data),
        "status": sample.status,
    }
    if changed := differences(indexed, actual):
        raise _changed_shard_error(f"{where}, key {key!r}", got="; ".join(changed))


def _changed_shard_error(where: str, *, got: str, expected: str | None = None) -> ShardError:
    return ShardError(
        "this shard was changed after it was indexed",
        code="shard.changed-since-index",
        where=where,
        got=got,
        expected=expected,
        next_step="restore the shard, or give the changed one another name",
    )


def read_groups(
    samples: Iterator[Sample],
    rendering: Rendering,
    pool: ThreadPoolExecutor,
    *,
    builder: IndexBuilder | None,
    pinned: bool = False,
) -> Iterator[GroupViews]:
    """Mix groups in tar order.

    Args:
        samples: every sample of a shard without an index (``read_samples``), or ``indexed_samples``.
        builder: collects the index of a shard that has none. ``None``: every sample must decode.
        pinned: render into page-locked memory, which a GPU can copy from while it computes.

    Raises:
        ShardError: the shard is damaged, or an indexed image can no longer be decoded.
    """
    number = 0
    exhausted = False
    while not exhausted:
        rendered: list[_Row] = []
        buffer_VNHWC = torch.empty(0)
        # The next candidate takes the place of a bad image, so that every group but the last is full.
        while len(rendered) < rendering.plan.mix_group and not exhausted:
            num_missing = rendering.plan.mix_group - len(rendered)
            chunk = list(islice(samples, num_missing))
            exhausted = len(chunk) < num_missing
            if not rendered:
                buffer_VNHWC = _new_buffer(rendering, len(chunk), pinned)
            free_VMHWC = buffer_VNHWC[:, len(rendered) :]
            rendered.extend(_render_chunk(chunk, free_VMHWC, rendering, pool, builder))
        if rendered:
            yield _assemble(rendered, buffer_VNHWC[:, : len(rendered)], rendering, number)
            number += 1


def _new_buffer(rendering: Rendering, num_rows: int, pinned: bool) -> Tensor:
    """Memory for the views of a group, in the layout that convolutions read: uint8 [V,N,H,W,C]."""
    shape = (len(rendering.view_numbers), num_rows, *height_width(rendering.size), 3)
    # The pool's threads are outside of inference mode and could not write into a tensor that was created in it.
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)


def _render_chunk(
    chunk: list[Sample],
    free_VMHWC: Tensor,
    rendering: Rendering,
    pool: ThreadPoolExecutor,
    builder: IndexBuilder | None,
) -> list[_Row]:
    """The candidates that decode. Their views fill ``free_VMHWC`` from its start, in the same order."""
    sizes_N2 = np.array(list(pool.map(_size_or_one, chunk)), np.int64).reshape(-1, 2)
    params = _sample_params(rendering, [f"{rendering.shard_id}/{sample.key}" for sample in chunk], sizes_N2)
    outcomes = pool.map(
        lambda row, sample, params: _render(sample, params, free_VMHWC[:, row], rendering),
        *(range(len(chunk)), chunk, params),
    )
    good: dict[int, _Row] = {}
    for row, (sample, outcome) in enumerate(zip(chunk, outcomes, strict=True)):
        if builder is not None:
            builder.add(sample, outcome.status, outcome.width, outcome.height, outcome.reason)
        elif outcome.status != "ok":
            raise ShardError(
                "an image that was usable when its shard was indexed is unusable now",
                code="shard.image-undecodable-now",
                where=f"{rendering.shard_id}/{sample.key}",
                got=f"{outcome.status}: {outcome.reason}" if outcome.reason else outcome.status,
                next_step="use the decoder versions that built the index",
            )
        if outcome.status == "ok":
            good[row] = _Row(sample, params[row], outcome.encoded_V, outcome.targets_V)
    if len(good) < len(chunk):
        free_VMHWC[:, : len(good)] = free_VMHWC[:, [*good]]
    return [*good.values()]


def _size_or_one(sample: Sample) -> tuple[int, int]:
    """(width, height) from the header; 1 x 1 for a bad image, so that all parameters are sampled in one call."""
    if sample.status != "ok":
        return 1, 1
    try:
        return image_size(sample.data)
    except BadImageError:
        return 1, 1


def _sample_params(rendering: Rendering, sample_ids: list[str], sizes_N2: NDArray[np.int64]) -> list[ViewParams]:
    """Parameters of the V views of each sample, in one vectorised call."""
    views = rendering.view_numbers
    if not sample_ids:
        return []
    widths, heights = (np.repeat(sizes_N2[:, axis], len(views)) for axis in (0, 1))
    if rendering.block.is_eval:
        params = eval_params(rendering.plan, widths, heights, rendering.size)
    else:
        keys = np.repeat(sample_keys(rendering.plan.seed, sample_ids), len(views), axis=0)
        params = view_params(rendering.plan, keys, np.tile(np.array(views, np.int64), len(sample_ids)), widths, heights)
    return [params.take(slice(start, start + len(views))) for start in range(0, len(widths), len(views))]


def _render(sample: Sample, params: ViewParams, views_VHWC: Tensor, rendering: Rendering) -> _Rendered:
    """Decodes the image once and fills ``views_VHWC``; a bad image leaves it unchanged."""
    if sample.status != "ok":
        return _Rendered(sample.status)
    try:
        image = decode(sample.data, max_pixels=rendering.max_pixels)
    except BadImageError as error:
        return _Rendered(error.status, reason=error.reason)
    height, width = image.shape[1:]
    if (reason := rendering.task.check_target(sample.target, width, height)) is not None:
        return _Rendered("bad_target", reason=reason)
    encoded_V: list[bytes] = []
    for view, (box, flip) in enumerate(zip(params.box_N4.tolist(), params.flip_N.tolist(), strict=True)):
        view_CHW, encoded = render_view(
            image,
            box,
            flip,
            aug_params_row(params.aug_params, view),
            quality=rendering.jpeg_quality,
            size=rendering.size,
            interpolation=rendering.interpolation,
            fill=rendering.plan.fill,
        )
        views_VHWC[view].copy_(view_CHW.permute(1, 2, 0))
        encoded_V += [] if encoded is None else [encoded]
    targets_V = _targets_of_views(sample, params, rendering)
    return _Rendered("ok", width, height, encoded_V=tuple(encoded_V), targets_V=targets_V)


def _targets_of_views(sample: Sample, params: ViewParams, rendering: Rendering) -> tuple[NDArray[Any], ...]:
    task, size = rendering.task, height_width(rendering.size)
    if task.view_target is None:
        return ()
    data = task.target_data(sample.target)
    target = None if data is None else task.decode_target(data)
    views = zip(params.box_N4.tolist(), params.flip_N.tolist(), strict=True)
    return tuple(task.target_of_view(target, box, flip, size) for box, flip in views)


def _assemble(
    rendered: list[_Row],
    pixels_VNHWC: Tensor,
    rendering: Rendering,
    number: int,
) -> GroupViews:
    samples = [row.sample for row in rendered]
    num_ok, views = len(rendered), rendering.view_numbers
    unmixed_N = np.arange(num_ok, dtype=np.int32)
    mixes = rendering.plan.mixes and not rendering.block.is_eval
    partner_VN = np.stack(
        [
            mix_partners(rendering.plan, rendering.shard_id, number, view, num_ok) if mixes else unmixed_N
            for view in views
        ]
    )
    params_VN = unmix(_stack([row.params for row in rendered]), partner_VN == unmixed_N)
    return GroupViews(
        shard_id=rendering.shard_id,
        samples=samples,
        row_N=np.array([sample.row for sample in samples], np.int32),
        content_hash_N=np.array([xxhash.xxh3_64_intdigest(sample.data) for sample in samples], np.uint64),
        targets=rendering.task.rows(sample.target for sample in samples),
        box_VN4=params_VN.box_N4,
        flip_VN=params_VN.flip_N,
        partner_VN=partner_VN,
        mix_lambda_VN=params_VN.mix_lambda_N,
        aug_params_VN=dict(params_VN.aug_params),
        pixels_VNCHW=pixels_VNHWC.movedim(-1, -3),
        encoded_VN=None
        if rendering.jpeg_quality is None
        else [*map(list, zip(*(row.encoded_V for row in rendered), strict=True))],
        view_targets_VN={}
        if rendering.task.view_target is None
        else {rendering.task.view_target: np.stack([np.stack(row.targets_V) for row in rendered], axis=1)},
    )


def _stack(params: list[ViewParams]) -> ViewParams:
    """The parameters of V views of each of N samples, stacked: [V, N, ...]."""
    return ViewParams(
        np.stack([sample.box_N4 for sample in params], axis=1),
        np.stack([sample.flip_N for sample in params], axis=1),
        np.stack([sample.mix_lambda_N for sample in params], axis=1),
        {name: np.stack([sample.aug_params[name] for sample in params], axis=1) for name in params[0].aug_params},
    )
