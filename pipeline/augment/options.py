"""Augmentation parameters of a plan's options: jitter, RandAugment, erasing and cutmix, as columns of plain numbers.

Values are computed in float64 and rounded to the types that a part stores; pixels depend on these alone. Geometry is in
fractions of the view, so that it does not depend on the size. docs/reference/format.md specifies the counter and the
map of every value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.augment.random_bits import (
    STREAM_CUTMIX,
    STREAM_ERASING,
    STREAM_JITTER,
    STREAM_OPS,
    Floats,
    Ints,
    RandomBits,
    log_uniform_between,
    sample_uniforms,
    uniform_between,
)
from schemas.cache_format import BOX_SIDES, JITTERS
from schemas.config import ErasingConfig, JitterConfig, RandAugmentConfig, ViewsConfig

OPS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "saturation",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
"""RandAugment's operations (Cubuk 2019, 1909.13719); a column stores the index in this list."""

# At strength m in 0..1 the magnitude of an operation is START + s · RANGE · m, with a random sign s if it is signed,
# else s = 1.
_START_O = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 8, 255, 0, 0], np.float64)
_RANGE_O = np.array([0, 0.3, 0.3, 150 / 331, 150 / 331, 30, 0.9, 0.9, 0.9, 0.9, -4, -255, 0, 0], np.float64)
_SIGNED_O = np.array([name in OPS[1:10] for name in OPS])
_POSTERIZE = OPS.index("posterize")
_FULL_MAGNITUDE = 30
_NUM_ORDERS = 24
_ERASING_ATTEMPTS = 10

AugParams = dict[str, NDArray[Any]]


def sample_aug_params(
    plan: ViewsConfig, keys_N2: RandomBits, views_N: Ints, mix_lambda_N: NDArray[np.float32]
) -> AugParams:
    """The columns of ``schemas.cache_format.aug_param_columns`` for one view of each of N rows: [N] each."""
    aug_params: AugParams = {}
    if plan.jitter is not None:
        aug_params |= _jitter(plan.jitter, keys_N2, views_N)
    if plan.randaugment is not None:
        aug_params |= _ops(plan.randaugment, keys_N2, views_N)
    if plan.erasing is not None:
        aug_params |= _erasing(plan.erasing, keys_N2, views_N)
    if plan.cutmix is not None:
        aug_params |= _cutmix(plan.cutmix, keys_N2, views_N, mix_lambda_N)
    return aug_params


def aug_params_row(aug_params: Mapping[str, NDArray[Any]], row: int) -> dict[str, float]:
    """One row of the columns, as plain numbers."""
    return {name: values_N[row].item() for name, values_N in aug_params.items()}


def cutmix_boxes(aug_params: Mapping[str, NDArray[Any]]) -> NDArray[np.float32] | None:
    """Boxes that show the partner: [..., 4] (left, top, width, height) in fractions of the view.

    Width 0: the row is blended. ``None``: the plan has no cutmix.
    """
    if "cut_left" not in aug_params:
        return None
    return np.stack([aug_params[f"cut_{side}"] for side in BOX_SIDES], axis=-1)


def without_boxes(aug_params: Mapping[str, NDArray[Any]], rows_N: NDArray[np.bool_]) -> AugParams:
    """The same columns without a cutmix box in these rows."""
    return {
        name: np.where(rows_N, np.float32(0), values_N) if name.startswith("cut_") else values_N
        for name, values_N in aug_params.items()
    }


def _jitter(jitter: JitterConfig, keys_N2: RandomBits, views_N: Ints) -> AugParams:
    """Rows that are not jittered have factors of 1 and a hue shift of 0."""
    choice_N4 = sample_uniforms(keys_N2, views_N, STREAM_JITTER)
    strength_N4 = sample_uniforms(keys_N2, views_N, STREAM_JITTER, 1)
    aug_params: AugParams = {"jitter_order": (choice_N4[:, 1] * _NUM_ORDERS).astype(np.uint8)}
    is_jittered_N = choice_N4[:, 0] < jitter.probability
    for name, strength_N in zip(JITTERS, strength_N4.T, strict=True):
        neutral, strength = float(name != "hue"), float(getattr(jitter, name))
        value_N = uniform_between(neutral - strength, neutral + strength, strength_N)
        aug_params[f"jitter_{name}"] = np.where(is_jittered_N, value_N, neutral).astype(np.float32)
    return aug_params


def _ops(randaugment: RandAugmentConfig, keys_N2: RandomBits, views_N: Ints) -> AugParams:
    aug_params: AugParams = {}
    for number in range(randaugment.num_ops):
        uniform_N4 = sample_uniforms(keys_N2, views_N, STREAM_OPS, number)
        op_N = (uniform_N4[:, 0] * len(OPS)).astype(np.uint8)
        spread = randaugment.magnitude_spread
        level_N = uniform_between(randaugment.magnitude - spread, randaugment.magnitude + spread, uniform_N4[:, 1])
        strength_N = np.clip(level_N, 0, _FULL_MAGNITUDE) / _FULL_MAGNITUDE
        sign_N = np.where(_SIGNED_O[op_N] & (uniform_N4[:, 2] < 0.5), -1.0, 1.0)
        magnitude_N = _START_O[op_N] + sign_N * _RANGE_O[op_N] * strength_N
        # posterize has a whole number of bits.
        magnitude_N = np.where(op_N == _POSTERIZE, np.rint(magnitude_N), magnitude_N)
        aug_params[f"op{number + 1}"] = op_N
        aug_params[f"op{number + 1}_magnitude"] = magnitude_N.astype(np.float32)
    return aug_params


def _erasing(erasing: ErasingConfig, keys_N2: RandomBits, views_N: Ints) -> AugParams:
    """Rows that are not erased have a box of size 0. Every row has a colour."""
    uniform_N4 = sample_uniforms(keys_N2, views_N, STREAM_ERASING)
    box_N4 = _erased_boxes(erasing, keys_N2, views_N)
    box_N4[uniform_N4[:, 0] >= erasing.probability] = 0
    aug_params = _box_columns("erase", box_N4)
    for channel, name in enumerate(("red", "green", "blue")):
        level_N = uniform_N4[:, 1 + channel] * 256
        if erasing.fill != "random":
            level_N = np.full(len(level_N), erasing.fill[channel])
        aug_params[f"erase_{name}"] = level_N.astype(np.uint8)
    return aug_params


def _erased_boxes(erasing: ErasingConfig, keys_N2: RandomBits, views_N: Ints) -> NDArray[np.float32]:
    """The first of ten attempts that fits into the view (Zhong 2017), else size 0: fractions, float32 [N, 4]."""
    box_N4 = np.zeros((len(keys_N2), 4), np.float32)
    pending_M = np.arange(len(keys_N2))
    for attempt in range(_ERASING_ATTEMPTS):
        uniform_M4 = sample_uniforms(keys_N2[pending_M], views_N[pending_M], STREAM_ERASING, 1 + attempt)
        area_M = uniform_between(*erasing.area, uniform_M4[:, 0])
        aspect_M = log_uniform_between(erasing.aspect, uniform_M4[:, 1])
        size_M2 = np.sqrt(np.stack([area_M * aspect_M, area_M / aspect_M], axis=1))
        fits_M = (size_M2 <= 1).all(axis=1)
        box_N4[pending_M[fits_M]] = _place_boxes(size_M2, uniform_M4[:, 2:])[fits_M]
        pending_M = pending_M[~fits_M]
        if not len(pending_M):
            break
    return box_N4


def _cutmix(share: float, keys_N2: RandomBits, views_N: Ints, mix_lambda_N: NDArray[np.float32]) -> AugParams:
    """A square of area 1 − λ inside the view in a ``share`` of the rows, size 0 in the others (Yun 2019, CutMix)."""
    uniform_N4 = sample_uniforms(keys_N2, views_N, STREAM_CUTMIX)
    side_N = np.sqrt(1 - mix_lambda_N.astype(np.float64))
    box_N4 = _place_boxes(np.stack([side_N, side_N], axis=1), uniform_N4[:, 1:3])
    box_N4[uniform_N4[:, 0] >= share] = 0
    return _box_columns("cut", box_N4)


def _box_columns(prefix: str, box_N4: NDArray[np.float32]) -> AugParams:
    return {f"{prefix}_{side}": side_N for side, side_N in zip(BOX_SIDES, box_N4.T, strict=True)}


def _place_boxes(size_N2: Floats, uniform_N2: Floats) -> NDArray[np.float32]:
    """Boxes of these sizes (width, height <= 1) at a uniform position inside the view: fractions, float32 [N, 4]."""
    return np.concatenate([uniform_N2 * (1 - size_N2), size_N2], axis=1).astype(np.float32)
