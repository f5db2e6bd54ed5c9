"""Build a teacher cache with Ray tasks. ``python -m jobs.build_cache CONFIG [k.k=v …]``."""

from __future__ import annotations

import logging
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

from jobs.build_tally import BuildTally, Built
from jobs.entry import config_command
from jobs.fan_out import fan_out
from jobs.log import tell
from jobs.paths import with_absolute_paths
from jobs.progress import ProgressView
from jobs.ray_runtime import cluster, num_tasks_here
from pipeline import storage
from pipeline.cache import layout
from pipeline.cache.build import (
    BusyTime,
    IndexTask,
    PartTask,
    build_part,
    cache_config,
    prepare,
    restore_index,
)
from pipeline.cache.commit import files_present, is_void, missing_blocks, read_commits, withdraw
from pipeline.cache.log import BuildLogWriter, remove_logs
from pipeline.cache.manifest import publish_manifest, read_manifest, read_table
from pipeline.cache.plan import survey_ground
from pipeline.cache.space import check_space
from pipeline.config import load_config
from pipeline.errors import CacheError, ShardError, StorageInputError
from pipeline.shards.names import shard_ids
from schemas.config import Config
from schemas.manifest import Commit, Manifest

_SIZE_THREADS = 16
_NUM_NAMED = 5


def build_cache(config: Config) -> Manifest:
    """Builds every part that has no commit yet, then publishes the manifest. Resumes by itself.

    Raises:
        CacheError: the cache was begun by another config or teacher, or holds shards that this config lacks.
        ShardError: a shard is missing, damaged, or changed.
        ResourceError: no node could run a task.
        StorageInputError: what is to be written does not fit on the disk it would go to.
    """
    config = with_absolute_paths(config)
    cache = cache_config(config)
    assert config.data.shards is not None
    urls = storage.expand(config.data.shards)
    by_id = dict(zip(shard_ids(urls), urls, strict=True))
    storage.probe(cache.url)
    commits = read_commits(cache.url)
    sizes = check_shards(cache.url, by_id, commits)
    for warning in check_space(
        survey_ground(config, cache, by_id, sizes, commits), num_tasks=num_tasks_here(config.ray)
    ):
        tell(f"cache: {warning}", event="warning", level=logging.WARNING)
    with cluster(config.ray):
        # One small task first: a wrong teacher or a foreign cache is found before anything is queued.
        list(fan_out(prepare, [config], config.ray, what="a cache task", name=lambda _: "the header of the cache"))
        _build_parts(config, by_id, commits)
    manifest = publish_manifest(cache.url, by_id)
    remove_logs(cache.url)
    return manifest


def check_shards(cache_url: str, by_id: dict[str, str], commits: list[Commit]) -> dict[str, int]:
    """Changes nothing. What a build would find out late, or not at all. Returns the bytes of each shard.

    Raises:
        CacheError: the finished cache has shards that are not asked for: it would lose them.
        ShardError: a shard is missing, or has another size than when its parts were built.
    """
    lacking = sorted(_finished_shards(cache_url, commits) - by_id.keys())
    if lacking:
        raise CacheError(
            f"this config lacks {len(lacking)} shards of the finished cache, which would lose them",
            where=storage.redact(cache_url),
            got=", ".join(lacking[:_NUM_NAMED]) + (", ..." if len(lacking) > _NUM_NAMED else ""),
            next_step="name all shards in data.shards, or build into another cache.url",
        )
    with ThreadPoolExecutor(_SIZE_THREADS) as pool:
        sizes = dict(zip(by_id, pool.map(_size_of, by_id.values()), strict=True))
    for commit in commits:
        if commit.shard_id in sizes and sizes[commit.shard_id] != commit.shard_size_bytes:
            raise ShardError(
                "this shard changed since its parts were built",
                where=storage.redact(by_id[commit.shard_id]),
                got=f"{sizes[commit.shard_id]} bytes",
                wanted=f"{commit.shard_size_bytes} bytes",
                next_step="restore the shard, or build into another cache.url",
            )
    return sizes


def _finished_shards(cache_url: str, commits: list[Commit]) -> set[str]:
    if not storage.exists(storage.join(cache_url, layout.MANIFEST)):
        return set()
    try:
        return set(read_table(cache_url, read_manifest(cache_url)[0].shards)["shard_id"].to_pylist())
    except CacheError:
        # A damaged manifest or table is published anew; the commits bound what it can have named.
        return {commit.shard_id for commit in commits}


def _size_of(url: str) -> int:
    try:
        return storage.size(url)
    except StorageInputError as error:
        raise ShardError(
            "this shard is missing",
            where=storage.redact(url),
            got=error.what,
            next_step="restore the shard, or correct data.shards",
        ) from error


def _build_parts(config: Config, by_id: dict[str, str], found: list[Commit]) -> None:
    assert config.cache is not None
    commits, lost = _take_stock(config, by_id, found)
    list(
        fan_out(restore_index, lost, config.ray, what="an index task", name=lambda task: storage.redact(task.shard_url))
    )
    tasks = plan_tasks(config, by_id, commits)
    num_done = len(commits)
    log = BuildLogWriter(config.cache.url, num_parts=num_done + len(tasks), num_before=num_done)
    log.update(num_done)
    tally = BuildTally(config, tasks, num_shards=len(by_id))
    tally.begin()
    try:
        with ProgressView("cache", num_done + len(tasks), done=num_done) as progress:
            built = fan_out(_build, tasks, config.ray, what="a cache task", name=_name_of, tally=tally)
            for done, _ in enumerate(built, start=1):
                log.update(num_done + done)
                progress.update(num_done + done, tally.note(), panel=tally.panel)
    finally:
        # Also of a build that was stopped or failed: it cost as much.
        tally.sum_up()


def _build(task: PartTask) -> Built:
    busy = BusyTime()
    return Built(build_part(task, busy), busy.seconds)


def _take_stock(config: Config, by_id: dict[str, str], found: list[Commit]) -> tuple[list[Commit], list[IndexTask]]:
    """The commits of these shards whose files are there, and the indexes they miss. Void commits are taken back."""
    assert config.cache is not None
    url = config.cache.url
    commits = [commit for commit in found if commit.shard_id in by_id]
    present = files_present(url)
    void = [commit for commit in commits if is_void(commit, present)]
    if void:
        tell(f"cache: {len(void)} commits were void: their files are gone, and are built again", event="void")
        withdraw(url, void)
    standing = [commit for commit in commits if not is_void(commit, present)]
    lost = {commit.shard_id: commit.index for commit in standing if commit.index.path not in present}
    return standing, [IndexTask(config, by_id[shard], index.sha256) for shard, index in lost.items()]


def _name_of(task: PartTask) -> str:
    return f"{storage.redact(task.shard_url)}, {task.block.name}"


def plan_tasks(config: Config, by_id: dict[str, str], commits: list[Commit]) -> list[PartTask]:
    """The parts that none of these commits names."""
    assert config.cache is not None
    committed: defaultdict[str, list[Commit]] = defaultdict(list)
    for commit in commits:
        committed[commit.shard_id].append(commit)
    return [
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
    tell(describe(build_cache(load_config(source, overrides))), event="end")


if __name__ == "__main__":
    config_command("build_cache", main)
