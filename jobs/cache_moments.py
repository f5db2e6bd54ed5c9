"""Mean and covariance of a cache's embeddings, computed by Ray tasks or by a plain loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jobs.cache_derive import ray_section
from jobs.cache_ops import describe_moments
from jobs.observability.log import emit
from jobs.observability.progress import ProgressView
from jobs.ray.address import announce
from jobs.ray.cluster import cpus_only
from jobs.ray.fan_out import fan_out
from pipeline import storage
from pipeline.cache.build.moments import MomentSums
from pipeline.cache.ops.moments import ShardSums, compute_moments
from pipeline.core.redaction import redact
from schemas.cache_format import Moments
from schemas.config import RayConfig


def cache_moments(cache_url: str, ray: RayConfig) -> tuple[Moments, bool]:
    """The record of the moments of a finished cache, and whether this call computed them. Progress goes to standard
    error.

    Raises:
        StillroomError: as ``compute_moments`` does; or no node could run a task.
    """
    # Ray's workers run in other directories.
    cache_url = storage.absolute(cache_url)

    def run(
        sums_of: ShardSums, items: Sequence[tuple[str, ...]]
    ) -> Iterator[tuple[tuple[str, ...], MomentSums | None]]:
        what = "a task that adds moments"
        with ProgressView("moments", len(items)) as progress:
            results = fan_out(sums_of, items, cpus_only(ray), what=what, name=lambda shards: _name(shards, cache_url))
            for done, result in enumerate(results, start=1):
                yield result
                progress.update(done, "groups of shards")

    return compute_moments(cache_url, run)


def _name(shards: tuple[str, ...], cache_url: str) -> str:
    first, *others = shards
    return f"{first}{f' and {len(others)} more' if others else ''} in {redact(cache_url)}"


def compute(cache_url: str, ray: RayConfig) -> None:
    """As ``cache_moments``; logs the result."""
    moments, is_new = cache_moments(cache_url, ray)
    emit(describe_moments(moments, is_new=is_new), event="end", is_new=is_new, **moments.model_dump(mode="json"))


def main(cache_url: str, overrides: list[str]) -> None:
    ray = ray_section(overrides, "stillroom cache moments")
    announce(ray.address)
    compute(cache_url, ray)
