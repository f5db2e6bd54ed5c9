"""Parameters of views: box, flip, mixing weight and the plan's options, a pure function of (plan, sample, view).

The parameters of a row do not depend on the other rows of a call, their number or order. They are the same bits on
every platform (see ``random_bits.py``). A cache stores them, so replay does not depend on this module; ``verify`` does.

Counter layout (part of the format): a view has the key ("view", seed, sample id) and the counters
(block, view, stream, 0); a matching of mixup partners has the key ("mix", seed, shard id) and the counters
(block, group, view // mix_repeat, 0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.augment.options import sample_aug_params, without_boxes
from pipeline.augment.random_bits import (
    STREAM_BOX,
    STREAM_CANARY,
    STREAM_FLIP_AND_MIX,
    STREAM_SCALE,
    Floats,
    Ints,
    RandomBits,
    key_of,
    log_uniform_between,
    philox4x64,
    sample_uniforms,
    uniform_between,
)
from schemas.config import Size, ViewsConfig, height_width

EVAL_VIEW = 65_535
"""The view number of an eval pass; numbers of a plan's views are smaller."""

_CROP_ATTEMPTS = 10
_MAX_INT32 = 2**31 - 1
_CANARY_SHARE = 0.001


@dataclass(frozen=True, slots=True)
class ViewParams:
    """Views of N samples.

    Attributes:
        box_N4: int32 (left, top, width, height) in pixels of the original after EXIF rotation. It begins inside the
            image; those of ``scale_crop`` and of letterboxes may reach beyond its right and lower edges.
        flip_N: bool; the crop is mirrored left to right after resizing.
        mix_lambda_N: float32 in [0.5, 1], the weight of the row itself; 1 if the plan does not mix. Partners depend on
            the whole shard, so rows without a partner keep their λ until ``unmix``.
        aug_params: sampled parameters of the options by column (``cache_format.aug_param_columns``), [N] each.
    """

    box_N4: NDArray[np.int32]
    flip_N: NDArray[np.bool_]
    mix_lambda_N: NDArray[np.float32]
    aug_params: Mapping[str, NDArray[Any]]

    def take(self, rows: slice) -> ViewParams:
        aug_params = {name: values_N[rows] for name, values_N in self.aug_params.items()}
        return ViewParams(self.box_N4[rows], self.flip_N[rows], self.mix_lambda_N[rows], aug_params)


def sample_keys(seed: int, sample_ids: Sequence[str]) -> RandomBits:
    """One key for each sample, for all of its views: uint64 [N, 2]."""
    keys = [key_of("view", seed, sample_id) for sample_id in sample_ids]
    return np.stack(keys) if keys else np.empty((0, 2), dtype=np.uint64)


def view_params(plan: ViewsConfig, keys_N2: RandomBits, views_N: Ints, widths_N: Ints, heights_N: Ints) -> ViewParams:
    """Parameters of one view of each of N samples; view numbers may differ between rows.

    Args:
        plan: eval views fit its size, if it has one; ``scale_crop`` needs it.
        keys_N2: ``sample_keys(plan.seed, …)``.
        views_N: view numbers from 0; online training uses epochs, which may exceed 65,535.
        widths_N, heights_N: pixels of the original after EXIF rotation, at least 1.
    """
    if plan.kind == "eval":
        return eval_params(plan, widths_N, heights_N)
    boxes = _scaled_boxes if plan.kind == "scale_crop" else _crop_boxes
    box_N4 = boxes(plan, keys_N2, views_N, widths_N, heights_N)
    uniform_N4 = sample_uniforms(keys_N2, views_N, STREAM_FLIP_AND_MIX)
    flip_N = uniform_N4[:, 0] < plan.flip
    # Beta(1, 1) is uniform. A row has the larger weight, so that it remains a view of its image.
    weight_N = np.maximum(uniform_N4[:, 1], 1 - uniform_N4[:, 1]) if plan.mixes else np.ones(len(keys_N2))
    lambda_N = weight_N.astype(np.float32)
    return ViewParams(box_N4, flip_N, lambda_N, sample_aug_params(plan, keys_N2, _as_ints(views_N), lambda_N))


def sample_views(
    plan: ViewsConfig,
    sample_ids: Sequence[str],
    view: int | Ints,
    width_N: NDArray[np.int32],
    height_N: NDArray[np.int32],
) -> ViewParams:
    """``view_params`` of these samples: of one view, or of a view each."""
    views_N = np.full(len(sample_ids), view, np.int64)
    return view_params(plan, sample_keys(plan.seed, sample_ids), views_N, _as_ints(width_N), _as_ints(height_N))


def eval_params(plan: ViewsConfig, widths_N: Ints, heights_N: Ints, size: Size | None = None) -> ViewParams:
    """A centred crop of the input's aspect ratio, or by ``eval_box: letterbox`` a box from the upper left around the
    whole image; neither flipped nor mixed, without the options of the plan.

    The width of the crop is ``rint(crop_fraction * (short / h))`` in float64 (halves to even), at least 1, for an input
    of h x w pixels and ``short = min(width * h, height * w)``; its height is the same with w in place of h. Left and
    top are half of what remains, rounded down.

    Args:
        size: of the input; default: that of the plan, else a square.
    """
    widths_N, heights_N = _as_ints(widths_N), _as_ints(heights_N)
    height, width = height_width(size or plan.size or 1)
    if plan.eval_box == "letterbox":
        box_width_N, box_height_N = _scaled_sides(_fitting(widths_N, heights_N, height, width), height, width)
        return _unaugmented(_boxes(np.zeros_like(widths_N), np.zeros_like(heights_N), box_width_N, box_height_N))
    short_N = np.minimum(widths_N * height, heights_N * width)
    box_width_N, box_height_N = (
        np.maximum(_rint(plan.crop_fraction * (short_N / side)), 1) for side in (height, width)
    )
    box_N4 = _boxes((widths_N - box_width_N) // 2, (heights_N - box_height_N) // 2, box_width_N, box_height_N)
    return _unaugmented(box_N4)


def _unaugmented(box_N4: NDArray[np.int32]) -> ViewParams:
    return ViewParams(box_N4, np.zeros(len(box_N4), dtype=np.bool_), np.ones(len(box_N4), dtype=np.float32), {})


def is_canary(keys_N2: RandomBits, views_N: Ints) -> NDArray[np.bool_]:
    """Whether these (sample, view) store a pixel digest, by hash: about one in a thousand. bool [N]."""
    return sample_uniforms(keys_N2, views_N, STREAM_CANARY)[:, 0] < _CANARY_SHARE


def mix_partners(plan: ViewsConfig, shard_id: str, group: int, view: int, num_ok: int) -> NDArray[np.int32]:
    """Mixup partners: a random matching of the ``num_ok`` ok rows of one mix group.

    Views with the same ``view // plan.mix_repeat`` have the same partners.

    Returns:
        int32 [num_ok]: the partner of each row, as a position in the group. An involution without fixed points, except
        that one row is its own partner if ``num_ok`` is odd.
    """
    random_bits_GM = _matching_bits(plan, shard_id, np.array([group]), view)
    return _match(random_bits_GM[:, :num_ok])[0]


def shard_partners(plan: ViewsConfig, shard_id: str, view: int, num_ok: int) -> NDArray[np.int32]:
    """``mix_partners`` of every group of a shard of ``num_ok`` ok rows, as ok ordinals of the shard: int32 [num_ok]."""
    full, rest = divmod(num_ok, plan.mix_group)
    random_bits_GM = _matching_bits(plan, shard_id, np.arange(full + 1), view)
    groups = [_match(random_bits_GM[:full]).reshape(-1), _match(random_bits_GM[full:, :rest])[0]]
    return (np.concatenate(groups) + np.arange(num_ok) // plan.mix_group * plan.mix_group).astype(np.int32)


def unmix(params: ViewParams, unpaired_N: NDArray[np.bool_]) -> ViewParams:
    """The same parameters with λ = 1 and no cutmix box in the rows that are their own partners."""
    lambda_N = np.where(unpaired_N, np.float32(1), params.mix_lambda_N)
    return replace(params, mix_lambda_N=lambda_N, aug_params=without_boxes(params.aug_params, unpaired_N))


def _matching_bits(plan: ViewsConfig, shard_id: str, groups_G: Ints, view: int) -> RandomBits:
    blocks = -(-plan.mix_group // 4)
    counters_GM4 = np.zeros((len(groups_G), blocks, 4), dtype=np.uint64)
    counters_GM4[:, :, 0] = np.arange(blocks)
    counters_GM4[:, :, 1] = groups_G[:, None]
    counters_GM4[:, :, 2] = view // plan.mix_repeat
    random_bits = philox4x64(key_of("mix", plan.seed, shard_id)[None], counters_GM4.reshape(-1, 4))
    return random_bits.reshape(len(groups_G), blocks * 4)[:, : plan.mix_group]


def _match(random_bits_GM: RandomBits) -> NDArray[np.int32]:
    """Sorts each group by its random bits and pairs neighbours: positions in the group, int32 [G, M]."""
    order_GM = np.argsort(random_bits_GM, axis=1, kind="stable")
    neighbour_M = np.arange(random_bits_GM.shape[1]) ^ 1
    if len(neighbour_M) % 2:
        neighbour_M[-1] -= 1
    partners_GM = np.empty(random_bits_GM.shape, dtype=np.int32)
    np.put_along_axis(partners_GM, order_GM, order_GM[:, neighbour_M].astype(np.int32), axis=1)
    return partners_GM


def _crop_boxes(
    plan: ViewsConfig, keys_N2: RandomBits, views_N: Ints, widths_N: Ints, heights_N: Ints
) -> NDArray[np.int32]:
    """Inception crops (Szegedy 2015): the first of ten attempts that fits, else the centre crop. int32 [N, 4]."""
    widths_N, heights_N, views_N = _as_ints(widths_N), _as_ints(heights_N), _as_ints(views_N)
    box_N4 = _central_boxes(plan, widths_N, heights_N)
    pending_M = np.arange(len(keys_N2))
    for attempt in range(_CROP_ATTEMPTS):
        uniform_M4 = sample_uniforms(keys_N2[pending_M], views_N[pending_M], STREAM_BOX, attempt)
        candidate_M4, fits_M = _attempt(plan, uniform_M4, widths_N[pending_M], heights_N[pending_M])
        box_N4[pending_M[fits_M]] = candidate_M4[fits_M]
        pending_M = pending_M[~fits_M]
        if not len(pending_M):
            break
    return box_N4


def _attempt(
    plan: ViewsConfig, uniform_M4: Floats, widths_M: Ints, heights_M: Ints
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """One attempt for each row, from samples for (area, aspect, left, top): int32 [M, 4] and bool [M], if it fits."""
    area_M = widths_M * heights_M * uniform_between(*plan.area, uniform_M4[:, 0])
    aspect_M = log_uniform_between(plan.aspect, uniform_M4[:, 1])
    width_M, height_M = _rint(np.sqrt(area_M * aspect_M)), _rint(np.sqrt(area_M / aspect_M))
    fits_M = (width_M > 0) & (width_M <= widths_M) & (height_M > 0) & (height_M <= heights_M)
    # u * n < n for u <= 1 - 2^-53, so the box is always inside the image.
    left_M = np.floor(uniform_M4[:, 2] * (widths_M - width_M + 1)).astype(np.int64)
    top_M = np.floor(uniform_M4[:, 3] * (heights_M - height_M + 1)).astype(np.int64)
    return _boxes(left_M, top_M, width_M, height_M), fits_M


def _scaled_boxes(
    plan: ViewsConfig, keys_N2: RandomBits, views_N: Ints, widths_N: Ints, heights_N: Ints
) -> NDArray[np.int32]:
    """What the input shows of the image at a scale, at a uniform place: int32 [N, 4].

    Along an axis on which the image is smaller, the box begins at the edge of the image and reaches beyond it.
    """
    assert plan.size is not None, "the boxes of scale_crop depend on the size"
    height, width = height_width(plan.size)
    widths_N, heights_N, views_N = _as_ints(widths_N), _as_ints(heights_N), _as_ints(views_N)
    uniform_N4 = sample_uniforms(keys_N2, views_N, STREAM_SCALE)
    fits_N = _fitting(widths_N, heights_N, height, width) if plan.relative_to == "size" else np.ones(len(keys_N2))
    box_width_N, box_height_N = _scaled_sides(fits_N / _scales(plan.scale, uniform_N4[:, 0]), height, width)
    left_N = np.floor(uniform_N4[:, 1] * (np.maximum(widths_N - box_width_N, 0) + 1)).astype(np.int64)
    top_N = np.floor(uniform_N4[:, 2] * (np.maximum(heights_N - box_height_N, 0) + 1)).astype(np.int64)
    return _boxes(left_N, top_N, box_width_N, box_height_N)


def _scales(scale: tuple[float, ...], uniform_N: Floats) -> Floats:
    low, high, *step = scale
    if not step:
        return uniform_between(low, high, uniform_N)
    return low + step[0] * np.floor(uniform_N * (round((high - low) / step[0]) + 1))


def _fitting(widths_N: Ints, heights_N: Ints, height: int, width: int) -> Floats:
    """Pixels of the original in one of the input that shows the whole image."""
    return np.maximum(widths_N / width, heights_N / height)


def _scaled_sides(pixels_N: Floats, height: int, width: int) -> tuple[Ints, Ints]:
    """Width and height of boxes with so many pixels of the original in one of the input."""
    box_width_N, box_height_N = (np.clip(_rint(side * pixels_N), 1, _MAX_INT32) for side in (width, height))
    return box_width_N, box_height_N


def _central_boxes(plan: ViewsConfig, widths_N: Ints, heights_N: Ints) -> NDArray[np.int32]:
    """The largest centred box whose aspect ratio is in the plan's range: int32 [N, 4]."""
    low, high = plan.aspect
    ratio_N = widths_N / heights_N
    width_N = np.where(ratio_N > high, np.maximum(_rint(heights_N * high), 1), widths_N)
    height_N = np.where(ratio_N < low, np.maximum(_rint(widths_N / low), 1), heights_N)
    return _boxes((widths_N - width_N) // 2, (heights_N - height_N) // 2, width_N, height_N)


def _as_ints(values_N: NDArray[np.integer[Any]]) -> Ints:
    # Index columns are int32, and an area could overflow.
    return np.asarray(values_N, dtype=np.int64)


def _rint(values_N: NDArray[np.floating[Any]]) -> Ints:
    return np.rint(values_N).astype(np.int64)


def _boxes(left_N: Ints, top_N: Ints, width_N: Ints, height_N: Ints) -> NDArray[np.int32]:
    return np.stack([left_N, top_N, width_N, height_N], axis=1).astype(np.int32)
