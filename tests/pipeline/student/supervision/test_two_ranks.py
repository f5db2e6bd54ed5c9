"""Drift and overlap are reported over the images of all ranks."""

from __future__ import annotations

from pathlib import Path

from pipeline.shards.index import index_shard
from pipeline.shards.writer import pack_shards
from pipeline.student.supervision.canaries import CanaryReport
from pipeline.student.supervision.overlap import SeenImages
from tests.pipeline.caches import TinyCache, digit_samples
from tests.pipeline.student.conftest import Replay
from tests.pipeline.student.runs import cached_source
from tests.ranks import group, run_two_ranks


def report(rendezvous: Path, rank: int, cache: TinyCache, seen_by_rank: list[list[str]]) -> None:
    """Training indexes are dealt to both ranks, shard 0 to one and shard 1 to the other."""
    with group(rendezvous, rank) as distributed:
        drift = (CanaryReport(2, 0, 0), CanaryReport(2, 1, 5))[rank]
        assert drift.over_ranks(distributed) == CanaryReport(4, 1, 5)
        seen = SeenImages()
        for url in seen_by_rank[rank]:
            seen.add(index_shard(Path(url), cache.config.data, where=url))
        source = cached_source(cache)
        overlap = seen.overlap(source, distributed)
        source.close()
        assert overlap.num_rows == 9
        assert overlap.sample_ids == ("digits-00/digit-0003", "digits-00/digit-0005", "digits-00/digit-0007")


def test_ranks_report_the_images_that_either_has_read(replays: Replay, tmp_path: Path) -> None:
    """Rank 1 has read only images of rank 0's training shard, and vice versa."""
    seen_by_rank = [
        pack_shards(
            (sample for row, sample in enumerate(digit_samples(35)) if row in rows),
            f"{tmp_path}/seen-by-{rank}-%02d.tar",
            shard_size=24,
        )
        for rank, rows in enumerate((range(30, 35), (3, 5, 7, 11)))
    ]
    run_two_ranks(report, tmp_path, replays("crop"), seen_by_rank)
