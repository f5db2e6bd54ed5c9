"""Bytes of the stored views of a planned cache and CPU time to encode them, from a few images of the first shard."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from pipeline.augment.options import aug_params_row
from pipeline.augment.params import sample_views
from pipeline.augment.pixels import apply_view
from pipeline.augment.stored_pixels import decode_view, encode_jpeg
from pipeline.cache.plan.plan_inputs import PlanInputs, PlannedPixels
from pipeline.models import load_untrained
from pipeline.shards.decode import BadImageError, decode
from pipeline.shards.shard_head import first_images
from pipeline.tasks import task_of
from schemas.config import Config, Interpolation, Size, height_width

_NUM_IMAGES = 16


@dataclass(frozen=True, slots=True)
class _View:
    size: Size
    interpolation: Interpolation


def sample_pixels(inputs: PlanInputs) -> PlanInputs:
    """The inputs with the bytes of a stored view, if the cache stores its views.

    Raises:
        ModelError: the teacher's input size is not in the config, and its network cannot be built.
    """
    plan = inputs.config.views
    if plan.pixels == "none":
        return inputs
    view = _view_of(inputs)
    if plan.jpeg_quality is None:
        return replace(inputs, pixels=PlannedPixels(3 * prod(height_width(view.size))))
    return replace(inputs, pixels=_encode_some(inputs, view, plan.jpeg_quality))


def _view_of(inputs: PlanInputs) -> _View:
    if inputs.header is not None:
        return _View(inputs.header.input_size, inputs.header.teacher["interpolation"])
    config: Config = inputs.config
    spec = load_untrained(config.teacher, widths=task_of(config.data).widths, size=config.views.size).input
    return _View(spec.size, spec.interpolation)


def _encode_some(inputs: PlanInputs, view: _View, quality: int) -> PlannedPixels:
    """A view of each of the first images; no bytes if none of them decodes, which a build would report."""
    config, (shard, url) = inputs.config, next(iter(inputs.urls.items()))
    sizes: list[int] = []
    cpu_s = 0.0
    images = first_images(url, config.data, size_bytes=inputs.sizes[shard], count=_NUM_IMAGES)
    for number, data in enumerate(images):
        try:
            image = decode(data, max_pixels=config.data.max_pixels)
        except BadImageError:
            continue
        height, width = image.shape[1:]
        sides = (np.array([side], np.int32) for side in (width, height))
        params = sample_views(config.views, [f"{shard}/{number}"], 0, *sides)
        box, flip = params.box_N4[0].tolist(), bool(params.flip_N[0])
        aug_params = aug_params_row(params.aug_params, 0)
        view_CHW = apply_view(
            image, box, flip, aug_params, size=view.size, interpolation=view.interpolation, fill=config.views.fill
        )
        began = time.thread_time()
        encoded = encode_jpeg(view_CHW, quality)
        decode_view(encoded, pixels=config.views.pixels, size=view.size)
        # The first call includes what a process does once.
        cpu_s += time.thread_time() - began if sizes else 0.0
        sizes.append(len(encoded))
    if not sizes:
        return PlannedPixels(0)
    return PlannedPixels(sum(sizes) / len(sizes), num_sampled=len(sizes), encode_s=cpu_s / max(1, len(sizes) - 1))
