"""Proof of pixels: recompute some cached views and compare digests before anything is learnt from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.augment.options import aug_params_row
from pipeline.augment.pixels import apply_view, pixel_digest, pixel_mean
from pipeline.cache.read.reader import TeacherCache
from pipeline.core.errors import CacheError
from pipeline.core.redaction import redact
from pipeline.student.data.sources import CachedSource, read_image
from pipeline.student.distributed import DistributedContext
from pipeline.teacher.numerics import numeric_env

_MAX_SHARDS = 8
# What decodes and resizes.
_PACKAGES = ("torchvision", "pillow", "torch")


@dataclass(frozen=True, slots=True)
class CanaryReport:
    """How many canaries were compared, and how far those drifted whose drift is allowed."""

    num_compared: int = 0
    num_drifted: int = 0
    levels: int = 0
    """Largest difference of an 8x8 block mean among these, in uint8 levels."""

    def plus(self, other: CanaryReport) -> CanaryReport:
        compared, drifted = self.num_compared + other.num_compared, self.num_drifted + other.num_drifted
        return CanaryReport(compared, drifted, max(self.levels, other.levels))

    def over_ranks(self, distributed: DistributedContext) -> CanaryReport:
        """What all ranks found: each may run on a machine of its own. Every rank calls it."""
        counts = torch.tensor([self.num_compared, self.num_drifted], device=distributed.device)
        compared, drifted = distributed.sum(counts).tolist()
        return CanaryReport(
            compared, drifted, int(distributed.max(torch.tensor(self.levels, device=distributed.device)))
        )

    def warning(self) -> str:
        return (
            f"this machine makes other pixels than those the teacher saw: {self.num_drifted} of {self.num_compared} "
            f"canaries differ, block means by up to {self.levels} of 255, which data.allow_pixel_drift allows"
        )


@dataclass(frozen=True, slots=True)
class _Drift:
    sample_id: str
    levels: int


def check_canaries(source: CachedSource, *, max_pixels: int, allowed_levels: int = 0) -> CanaryReport:
    """Recomputes the canaries of view 0 of each cache in up to eight shards spread over it, at its teacher's size.

    Args:
        allowed_levels: how far block means may differ, in uint8 levels; 0: pixels must be the same.

    Raises:
        CacheError: this machine's decoder or resize gives other pixels than those the teacher saw, an image is not the
            cached one, or the cache carries no proof.
    """
    try:
        found = CanaryReport()
        for number in range(len(source.caches)):
            found = found.plus(_check_cache(source, number, max_pixels, allowed_levels))
        return found
    finally:
        # Shards open again when they are read; until then a training that does not begin leaves none open.
        source.close()


def _check_cache(source: CachedSource, number: int, max_pixels: int, allowed_levels: int) -> CanaryReport:
    cache = source.caches[number]
    compared, drifts = 0, list[_Drift]()
    for shard in range(0, len(source.shard_ids), -(-len(source.shard_ids) // _MAX_SHARDS)):
        in_shard, found = _check_shard(source, number, shard, max_pixels)
        compared, drifts = compared + in_shard, drifts + found
    levels = max((drift.levels for drift in drifts), default=0)
    # Pixels that differ by less than a level of any block still differ.
    if drifts and max(levels, 1) > allowed_levels:
        raise _drift_error(cache, drifts, compared)
    if not compared:
        raise CacheError(
            "no row of this cache carries a pixel digest, so nothing proves that this machine makes the same pixels",
            where=redact(cache.url),
            next_step="build another cache",
        )
    return CanaryReport(compared, len(drifts), levels)


def _drift_error(cache: TeacherCache, drifts: list[_Drift], compared: int) -> CacheError:
    here, levels = numeric_env(torch.device("cpu"), batch_size=1), max(drift.levels for drift in drifts)
    return CacheError(
        "this machine makes other pixels than those the teacher saw",
        where=f"{len(drifts)} of {compared} canaries, first {drifts[0].sample_id}",
        got=f"block means differ by up to {levels} of 255; here: {_told(here)}",
        expected=f"the cache was built with {_told(cache.manifest.environment)}",
        next_step="install the versions the cache was built with, or build another cache; to train on these pixels all "
        f"the same, and have it recorded: --allow-pixel-drift {max(levels, 1)} (data.allow_pixel_drift)",
    )


def _check_shard(source: CachedSource, number: int, shard: int, max_pixels: int) -> tuple[int, list[_Drift]]:
    columns = source.columns(shard, 0)[number]
    teacher = source.caches[number].header.teacher
    size, interpolation = int(teacher["size"]), teacher["interpolation"]
    ordinals = [row for row, digest in enumerate(columns.pixel_digest) if digest is not None]
    rows = source.rows(shard, np.array(ordinals, np.int32), 0)
    drifts: list[_Drift] = []
    for row, (ordinal, place) in enumerate(zip(ordinals, rows.places, strict=True)):
        image = read_image(source, shard, place, sample_id=rows.sample_ids[row], max_pixels=max_pixels)
        box, flip = rows.rows_N["box"][row].tolist(), bool(rows.rows_N["flip"][row])
        drawn = aug_params_row(rows.drawn, row)
        view = apply_view(image, box, flip, drawn, size=size, interpolation=interpolation)
        if pixel_digest(view) != columns.pixel_digest[ordinal]:
            drifts.append(_Drift(rows.sample_ids[row], _distance(pixel_mean(view), columns.pixel_mean[ordinal])))
    return len(ordinals), drifts


def _distance(mean: bytes, stored: bytes | None) -> int:
    # A digest without a mean says that pixels differ, and not by how much: then it is the most that it can be.
    if stored is None:
        return 255
    return int(np.abs(np.frombuffer(mean, np.uint8).astype(np.int16) - np.frombuffer(stored, np.uint8)).max())


def _told(versions: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {versions.get(name, 'unknown')}" for name in _PACKAGES)
