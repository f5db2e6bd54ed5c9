"""Build a teacher cache with Ray tasks. ``python -m jobs.build_cache CONFIG [k.k=v …]``."""

from __future__ import annotations

import sys
import time
from collections import defaultdict

from jobs.entry import config_command
from jobs.fan_out import fan_out
from jobs.paths import with_absolute_paths
from jobs.progress import ProgressView
from jobs.ray_runtime import cluster
from pipeline import storage
from pipeline.cache.build import PartTask, build_part, cache_config, prepare
from pipeline.cache.commit import missing_blocks, read_commits
from pipeline.cache.manifest import publish_manifest
from pipeline.config import load_config
from pipeline.shards.names import shard_ids
from schemas.config import Config
from schemas.manifest import Commit, Manifest


def build_cache(config: Config) -> Manifest:
    """Builds every part that has no commit yet, then publishes the manifest. Resumes by itself.

    Raises:
        CacheError: the cache was begun by another config or teacher.
        ShardError: a shard is missing, damaged, or changed.
        ResourceError: no node could run a task.
    """
    config = with_absolute_paths(config)
    cache = cache_config(config)
    assert config.data.shards is not None
    urls = storage.expand(config.data.shards)
    by_id = dict(zip(shard_ids(urls), urls, strict=True))
    with cluster(config.ray):
        # One small task first: a wrong teacher or a foreign cache is found before anything is queued.
        list(fan_out(prepare, [config], config.ray, what="a cache task"))
        _build_parts(config, by_id)
    return publish_manifest(cache.url, by_id)


def _build_parts(config: Config, by_id: dict[str, str]) -> None:
    tasks, num_done = plan_tasks(config, by_id)
    rows, began = 0, time.monotonic()
    with ProgressView("cache", num_done + len(tasks), done=num_done) as progress:
        for done, (_, commit) in enumerate(fan_out(build_part, tasks, config.ray, what="a cache task"), start=1):
            rows += commit.written * len(commit.views)
            progress.update(num_done + done, f"{rows / (time.monotonic() - began):.0f} rows/s")


def plan_tasks(config: Config, by_id: dict[str, str]) -> tuple[list[PartTask], int]:
    """The parts that no commit names, and how many do have one."""
    assert config.cache is not None
    committed: defaultdict[str, list[Commit]] = defaultdict(list)
    for commit in read_commits(config.cache.url):
        committed[commit.shard_id].append(commit)
    tasks = [
        PartTask(config, url, block)
        for shard, url in by_id.items()
        for block in missing_blocks(
            committed[shard],
            num_views=config.views.count,
            views_per_part=config.cache.views_per_part,
            wants_eval=config.cache.class_means == "eval",
            where=f"{shard} in {storage.redact(config.cache.url)}",
        )
    ]
    return tasks, sum(len(committed[shard]) for shard in by_id)


def describe(manifest: Manifest) -> str:
    """One line for the end of a build."""
    skipped = sum(manifest.skipped.values())
    hits, labelled = manifest.statistics.top1_hits, manifest.statistics.labelled
    teacher = f", teacher top-1 {hits / labelled:.1%}" if labelled else ""
    return (
        f"cache: {manifest.num_ok} images x {manifest.num_views} views in {manifest.num_shards} shards, "
        f"{manifest.size_bytes / 1e6:.1f} MB, {skipped} skipped{teacher}"
    )


def main(source: str, overrides: list[str]) -> None:
    print(describe(build_cache(load_config(source, overrides))), file=sys.stderr)


if __name__ == "__main__":
    config_command("build_cache", main)
