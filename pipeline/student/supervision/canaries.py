"""Canaries: some cached views are recomputed, and their pixel digests compared, before a training starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.augment.options import aug_params_row
from pipeline.augment.pixels import apply_view, pixel_digest, pixel_mean
from pipeline.cache.format.header import plan_of
from pipeline.cache.read.reader import TeacherCache
from pipeline.core.errors import CacheError
from pipeline.core.redaction import redact
from pipeline.student.data.sources import CachedSource
from pipeline.student.distributed import DistributedContext
from pipeline.teacher.numerics import numeric_env
from schemas.config import DataConfig

_MAX_SHARDS = 8
# The packages that decode and resize.
_PACKAGES = ("torchvision", "pillow", "torch")


@dataclass(frozen=True, slots=True)
class CanaryReport:
    """How many canaries were compared, how many differ within ``data.allow_pixel_drift``, and by how much.

    Attributes:
        levels: the largest difference of an 8x8 block mean, in uint8 levels.
    """

    num_compared: int = 0
    num_drifted: int = 0
    levels: int = 0

    def over_ranks(self, distributed: DistributedContext) -> CanaryReport:
        """The report over all ranks, which may run on different machines. Every rank calls it."""
        counts = torch.tensor([self.num_compared, self.num_drifted], device=distributed.device)
        compared, drifted = distributed.sum(counts).tolist()
        levels = distributed.max(torch.tensor(self.levels, device=distributed.device))
        return CanaryReport(compared, drifted, int(levels))

    def warning(self) -> str:
        return (
            "this machine computes pixels that differ from the teacher's input: "
            f"{self.num_drifted} of {self.num_compared} "
            f"canaries differ, block means by up to {self.levels} of 255, which data.allow_pixel_drift allows"
        )


def check_canaries(source: CachedSource, data: DataConfig) -> CanaryReport:
    """Recomputes the canaries of view 0 of each cache in up to eight shards spread over it, at its teacher's size.

    Args:
        data: ``allow_pixel_drift`` is how far block means may differ, in uint8 levels; 0: pixels must be the same.

    Raises:
        CacheError: this machine's decoder or resize computes pixels that differ from the teacher's input, an image is
            not the cached one, or the cache has no pixel digest.
    """
    try:
        reports = [_check_cache(source, number, data) for number in range(len(source.caches))]
        return CanaryReport(
            sum(report.num_compared for report in reports),
            sum(report.num_drifted for report in reports),
            max(report.levels for report in reports),
        )
    finally:
        # Shards open again when they are read; until then a training that does not start leaves none open.
        source.close()


def _check_cache(source: CachedSource, number: int, data: DataConfig) -> CanaryReport:
    cache, compared, drifts = source.caches[number], 0, dict[str, int]()
    for shard in range(0, len(source.shard_ids), -(-len(source.shard_ids) // _MAX_SHARDS)):
        in_shard, drifted = _check_shard(source, number, shard, data.max_pixels)
        compared, drifts = compared + in_shard, drifts | drifted
    levels = max(drifts.values(), default=0)
    # Pixels that differ by less than a level of any block still differ.
    if drifts and max(levels, 1) > data.allow_pixel_drift:
        raise _drift_error(cache, drifts, compared)
    if not compared:
        raise CacheError(
            "no row of this cache has a pixel digest, so this machine's pixels cannot be verified",
            code="cache.no-canaries",
            where=redact(cache.url),
            next_step="build another cache",
        )
    return CanaryReport(compared, len(drifts), levels)


def _drift_error(cache: TeacherCache, drifts: Mapping[str, int], compared: int) -> CacheError:
    here, levels = numeric_env(torch.device("cpu"), batch_size=1), max(drifts.values())
    return CacheError(
        "this machine computes pixels that differ from the teacher's input",
        code="cache.pixel-drift",
        where=f"{len(drifts)} of {compared} canaries, first {next(iter(drifts))}",
        got=f"block means differ by up to {levels} of 255; here: {_versions(here)}",
        expected=f"the cache was built with {_versions(cache.manifest.environment)}",
        next_step="install the versions the cache was built with, or build another cache; to train on these pixels "
        f"nevertheless, and record it: --allow-pixel-drift {max(levels, 1)} (data.allow_pixel_drift)",
    )


def _check_shard(source: CachedSource, number: int, shard: int, max_pixels: int) -> tuple[int, dict[str, int]]:
    """How many canaries the shard has, and by how many levels some differ, by their sample ids."""
    proofs = source.pixel_proofs(shard, 0)[number]
    header = source.caches[number].header
    size, interpolation, fill = header.input_size, header.teacher["interpolation"], plan_of(header).fill
    ordinals = [row for row, digest in enumerate(proofs.digests) if digest is not None]
    rows = source.rows(shard, np.array(ordinals, np.int32), 0)
    drifts: dict[str, int] = {}
    byte_ranges = rows.pixel_ranges if source.stores_views else rows.byte_ranges
    for row, (ordinal, byte_range) in enumerate(zip(ordinals, byte_ranges, strict=True)):
        if source.stores_views:
            # A machine decodes them in its own way, too.
            view = source.stored_view(shard, 0, byte_range, sample_id=rows.sample_ids[row])
        else:
            image = source.files.image(shard, byte_range, sample_id=rows.sample_ids[row], max_pixels=max_pixels)
            box, flip = rows.rows_N["box"][row].tolist(), bool(rows.rows_N["flip"][row])
            aug_params = aug_params_row(rows.aug_params, row)
            view = apply_view(image, box, flip, aug_params, size=size, interpolation=interpolation, fill=fill)
        if pixel_digest(view) != proofs.digests[ordinal]:
            drifts[rows.sample_ids[row]] = _distance(pixel_mean(view), proofs.means[ordinal])
    return len(ordinals), drifts


def _distance(mean: bytes, stored: bytes | None) -> int:
    # A digest without a mean shows that pixels differ, but not by how much: the largest difference is assumed.
    if stored is None:
        return 255
    return int(np.abs(np.frombuffer(mean, np.uint8).astype(np.int16) - np.frombuffer(stored, np.uint8)).max())


def _versions(versions: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {versions.get(name, 'unknown')}" for name in _PACKAGES)
