"""Proof of pixels: recompute some cached views and compare digests before anything is learnt from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torchvision

from pipeline.errors import CacheError
from pipeline.shards.decode import decode
from pipeline.student.sources import CachedSource
from pipeline.views.pixels import apply_view, pixel_digest, pixel_mean

_MAX_SHARDS = 8


@dataclass(frozen=True, slots=True)
class _Drift:
    sample_id: str
    levels: float
    """Largest difference of an 8x8 block mean, in uint8 levels."""


def check_canaries(source: CachedSource, *, max_pixels: int) -> int:
    """Recomputes the canaries of view 0 in up to eight shards spread over the cache. Returns how many were compared.

    Raises:
        CacheError: this machine's decoder or resize gives other pixels than those the teacher saw.
    """
    compared, drifts = 0, list[_Drift]()
    step = max(1, len(source.shard_ids) // _MAX_SHARDS)
    for shard in range(0, len(source.shard_ids), step):
        number, found = _check_shard(source, shard, max_pixels)
        compared, drifts = compared + number, drifts + found
    if drifts:
        worst = max(drifts, key=lambda drift: drift.levels)
        raise CacheError(
            "this machine makes other pixels than those the teacher saw",
            where=f"{len(drifts)} of {compared} canaries, first {drifts[0].sample_id}",
            got=f"block means differ by up to {worst.levels:.0f} of 255; torchvision here is {torchvision.__version__}",
            wanted=f"torchvision of the cache: {_built_with(source)}",
            next_step="install the versions the cache was built with, or build another cache",
        )
    return compared


def _check_shard(source: CachedSource, shard: int, max_pixels: int) -> tuple[int, list[_Drift]]:
    columns = source.cache.view(source.shard_ids[shard], 0)
    index = source.index(shard)
    teacher = source.cache.header.teacher
    ordinals = [row for row, digest in enumerate(columns.pixel_digest) if digest is not None]
    drifts: list[_Drift] = []
    for ordinal in ordinals:
        position = int(index.ok[ordinal])
        image = decode(
            source.read(shard, int(index.offset[position]), int(index.size[position])), max_pixels=max_pixels
        )
        view = apply_view(
            image,
            columns.box_N4[ordinal].tolist(),
            bool(columns.flip_N[ordinal]),
            size=int(teacher["size"]),
            interpolation=teacher["interpolation"],
        )
        if pixel_digest(view) != columns.pixel_digest[ordinal]:
            stored = np.frombuffer(columns.pixel_mean[ordinal] or bytes(192), np.uint8).astype(np.int16)
            levels = np.abs(np.frombuffer(pixel_mean(view), np.uint8) - stored).max()
            drifts.append(_Drift(index.sample_ids([position])[0], float(levels)))
    return len(ordinals), drifts


def _built_with(source: CachedSource) -> str:
    return str(source.cache.manifest.environment.get("torchvision", "unknown"))
