"""From a shard to mix groups of rendered views: each image decoded once for all views of a block.

Memory holds mix group x views of a block, never the rows of a shard: each view is rendered to its place in the group.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from pipeline.augment.options import cutmix_boxes, drawn_row
from pipeline.augment.params import (
    EVAL_VIEW,
    ViewParams,
    eval_params,
    mix_partners,
    sample_keys,
    unmix,
    view_params,
)
from pipeline.augment.pixels import apply_view
from pipeline.core.errors import ShardError
from pipeline.core.hashing import differences
from pipeline.shards.decode import BadImageError, BadStatus, decode, image_size
from pipeline.shards.index import NO_LABEL, STATUSES, IndexBuilder, ShardIndex
from pipeline.shards.tar import Sample, TarNotes, read_samples
from schemas.cache_format import Status, ViewBlock
from schemas.config import DataConfig, Interpolation, ViewsConfig

_AFTER_DECODING = ("ok", *get_args(BadStatus))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """Which views of an image are wanted, at what size. ``size`` in pixels."""

    plan: ViewsConfig
    block: ViewBlock
    size: int
    interpolation: Interpolation

    @property
    def view_numbers(self) -> list[int]:
        return [EVAL_VIEW] if self.block.is_eval else list(self.block.views)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupViews:
    """One mix group: N consecutive ok rows of a shard under the V views of a block."""

    shard_id: str
    samples: list[Sample]
    row_N: NDArray[np.int32]
    content_hash_N: NDArray[np.uint64]
    label_N: NDArray[np.int32]
    box_VN4: NDArray[np.int32]
    flip_VN: NDArray[np.bool_]
    partner_VN: NDArray[np.int32]
    mix_lambda_VN: NDArray[np.float32]
    drawn_VN: dict[str, NDArray[Any]]
    pixels_VNCHW: Tensor

    @property
    def mixes(self) -> bool:
        return bool((self.mix_lambda_VN != 1).any())

    @property
    def mixing(self) -> list[tuple[NDArray[Any], ...]]:
        """Of each view partners, λ and, where the plan has them, boxes: what ``Teacher.answer`` mixes by."""
        cutmix_box_VN4 = cutmix_boxes(self.drawn_VN)
        return list(
            zip(self.partner_VN, self.mix_lambda_VN, *([] if cutmix_box_VN4 is None else [cutmix_box_VN4]), strict=True)
        )

    @property
    def sample_ids(self) -> list[str]:
        return [f"{self.shard_id}/{sample.key}" for sample in self.samples]


@dataclass(frozen=True, slots=True)
class _Rendered:
    """What became of one candidate; width and height in pixels, 0 unless ok."""

    status: Status
    width: int = 0
    height: int = 0
    reason: str | None = None


def fresh_samples(path: Path, data: DataConfig, *, where: str, notes: TarNotes | None = None) -> Iterator[Sample]:
    """Candidates of a shard that has no index yet: every sample, in tar order. ``notes`` as in ``read_samples``."""
    return read_samples(path, data, where=where, notes=notes)


def indexed_samples(
    path: Path, index: ShardIndex, data: DataConfig, *, where: str, notes: TarNotes | None = None
) -> Iterator[Sample]:
    """The ok samples of an indexed shard, in tar order. The whole tar is read, and each sample is held to its row.

    Raises:
        ShardError: the tar is not the one that was indexed, or is damaged.
    """
    keys, num_read = index.keys.to_pylist(), 0
    for sample in read_samples(path, data, where=where, rules=index.member_rules, notes=notes):
        num_read += 1
        if num_read > len(index):
            raise _changed(where, got=f"a sample {sample.key!r} beyond the {len(index)} indexed")
        _check_indexed(sample, index, keys[sample.row], where)
        if index.status[sample.row] == STATUSES.index("ok"):
            yield sample
    if num_read < len(index):
        raise _changed(where, got=f"{num_read} samples", expected=f"{len(index)}")


def _check_indexed(sample: Sample, index: ShardIndex, key: str, where: str) -> None:
    row, status = sample.row, STATUSES[index.status[sample.row]]
    indexed = {
        "key": key,
        "label": int(index.label[row]),
        "offset": int(index.offset[row]),
        "size": int(index.size[row]),
        "content_hash": int(index.content_hash[row]),
        # Only a decoder tells whether an image that is there can be used.
        "status": "ok" if sample.status == "ok" and status in _AFTER_DECODING else status,
    }
    found = {
        "key": sample.key,
        "label": NO_LABEL if sample.label is None else sample.label,
        "offset": sample.offset,
        "size": sample.size,
        "content_hash": xxhash.xxh3_64_intdigest(sample.data),
        "status": sample.status,
    }
    if changed := differences(indexed, found):
        raise _changed(f"{where}, key {key!r}", got="; ".join(changed))


def _changed(where: str, *, got: str, expected: str | None = None) -> ShardError:
    return ShardError(
        "this shard was changed after it was indexed",
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
    shard_id: str,
    max_pixels: int,
    builder: IndexBuilder | None,
    pinned: bool = False,
) -> Iterator[GroupViews]:
    """Mix groups in tar order.

    Every candidate of a fresh shard is reported to ``builder``, so that an index falls out of the first pass. Without
    one the candidates come from an index, and every one of them must be usable. ``pinned`` pixels lie in page-locked
    memory, from which a GPU copies while it computes.

    Raises:
        ShardError: the shard is damaged, or an indexed image can no longer be used.
    """
    number = 0
    exhausted = False
    while not exhausted:
        kept: list[tuple[Sample, ViewParams]] = []
        room_VNHWC = torch.empty(0)
        # A bad image makes room for the next candidate, so that groups are always full but for the last.
        while len(kept) < rendering.plan.mix_group and not exhausted:
            expected = rendering.plan.mix_group - len(kept)
            chunk = list(islice(samples, expected))
            exhausted = len(chunk) < expected
            if not kept:
                room_VNHWC = _room(rendering, len(chunk), pinned)
            free_VMHWC = room_VNHWC[:, len(kept) :]
            kept.extend(_render_chunk(chunk, free_VMHWC, rendering, pool, shard_id, max_pixels, builder))
        if kept:
            yield _assemble(kept, room_VNHWC[:, : len(kept)], rendering, shard_id, number)
            number += 1


def _room(rendering: Rendering, num_rows: int, pinned: bool) -> Tensor:
    """Where the views of a group are rendered to, in the layout that convolutions read: uint8 [V,N,H,W,C]."""
    shape = (len(rendering.view_numbers), num_rows, rendering.size, rendering.size, 3)
    # A tensor made in inference mode could not be written by the pool's threads, which are not in it.
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)


def _render_chunk(
    chunk: list[Sample],
    free_VMHWC: Tensor,
    rendering: Rendering,
    pool: ThreadPoolExecutor,
    shard_id: str,
    max_pixels: int,
    builder: IndexBuilder | None,
) -> list[tuple[Sample, ViewParams]]:
    """The candidates that can be used; their views stand at the start of ``free_VMHWC``, in the same order."""
    sizes_N2 = np.array(list(pool.map(_size_or_one, chunk)), np.int64).reshape(-1, 2)
    drawn = _draw(rendering, [f"{shard_id}/{sample.key}" for sample in chunk], sizes_N2)
    rendered = pool.map(
        lambda place, sample, params: _render(sample, params, free_VMHWC[:, place], rendering, max_pixels),
        *(range(len(chunk)), chunk, drawn),
    )
    good: list[int] = []
    for place, (sample, outcome) in enumerate(zip(chunk, rendered, strict=True)):
        if builder is not None:
            builder.add(sample, outcome.status, outcome.width, outcome.height, outcome.reason)
        elif outcome.status != "ok":
            raise ShardError(
                "an image that could be used when its shard was indexed cannot be used now",
                code="shard.image-undecodable-now",
                where=f"{shard_id}/{sample.key}",
                got=f"{outcome.status}: {outcome.reason}" if outcome.reason else outcome.status,
                next_step="use the decoder versions the index was made with",
            )
        if outcome.status == "ok":
            good.append(place)
    if len(good) < len(chunk):
        free_VMHWC[:, : len(good)] = free_VMHWC[:, good]
    return [(chunk[place], drawn[place]) for place in good]


def _size_or_one(sample: Sample) -> tuple[int, int]:
    """(width, height) from the header; 1 x 1 for what will not decode, so that parameters can be drawn in one call."""
    if sample.status != "ok":
        return 1, 1
    try:
        return image_size(sample.data)
    except BadImageError:
        return 1, 1


def _draw(rendering: Rendering, sample_ids: list[str], sizes_N2: NDArray[np.int64]) -> list[ViewParams]:
    """Parameters of the V views of each sample, drawn in one vectorised call."""
    views = rendering.view_numbers
    if not sample_ids:
        return []
    widths, heights = (np.repeat(sizes_N2[:, axis], len(views)) for axis in (0, 1))
    if rendering.block.is_eval:
        params = eval_params(rendering.plan, widths, heights)
    else:
        keys = np.repeat(sample_keys(rendering.plan.seed, sample_ids), len(views), axis=0)
        params = view_params(rendering.plan, keys, np.tile(np.array(views, np.int64), len(sample_ids)), widths, heights)
    return [params.take(slice(start, start + len(views))) for start in range(0, len(widths), len(views))]


def _render(sample: Sample, params: ViewParams, views_VHWC: Tensor, rendering: Rendering, max_pixels: int) -> _Rendered:
    """Decodes once and fills ``views_VHWC``; leaves it as it is where the image cannot be used."""
    if sample.status != "ok":
        return _Rendered(sample.status)
    try:
        image = decode(sample.data, max_pixels=max_pixels)
    except BadImageError as error:
        return _Rendered(error.status, reason=error.reason)
    for view, (box, flip) in enumerate(zip(params.box_N4.tolist(), params.flip_N.tolist(), strict=True)):
        view_CHW = apply_view(
            image,
            box,
            flip,
            drawn_row(params.drawn, view),
            size=rendering.size,
            interpolation=rendering.interpolation,
        )
        views_VHWC[view].copy_(view_CHW.permute(1, 2, 0))
    return _Rendered("ok", image.shape[2], image.shape[1])


def _assemble(
    kept: list[tuple[Sample, ViewParams]], pixels_VNHWC: Tensor, rendering: Rendering, shard_id: str, number: int
) -> GroupViews:
    samples = [sample for sample, _ in kept]
    num_ok, views = len(kept), rendering.view_numbers
    own = np.arange(num_ok, dtype=np.int32)
    mixes = rendering.plan.mixes and not rendering.block.is_eval
    partner_VN = np.stack(
        [mix_partners(rendering.plan, shard_id, number, view, num_ok) if mixes else own for view in views]
    )
    params_VN = unmix(_stack([params for _, params in kept]), partner_VN == own)
    return GroupViews(
        shard_id=shard_id,
        samples=samples,
        row_N=np.array([sample.row for sample in samples], np.int32),
        content_hash_N=np.array([xxhash.xxh3_64_intdigest(sample.data) for sample in samples], np.uint64),
        label_N=np.array([-1 if sample.label is None else sample.label for sample in samples], np.int32),
        box_VN4=params_VN.box_N4,
        flip_VN=params_VN.flip_N,
        partner_VN=partner_VN,
        mix_lambda_VN=params_VN.mix_lambda_N,
        drawn_VN=dict(params_VN.drawn),
        pixels_VNCHW=pixels_VNHWC.movedim(-1, -3),
    )


def _stack(params: list[ViewParams]) -> ViewParams:
    """N samples' parameters of V views each as one, [V, N, ...]."""
    return ViewParams(
        np.stack([one.box_N4 for one in params], axis=1),
        np.stack([one.flip_N for one in params], axis=1),
        np.stack([one.mix_lambda_N for one in params], axis=1),
        {name: np.stack([one.drawn[name] for one in params], axis=1) for name in params[0].drawn},
    )
