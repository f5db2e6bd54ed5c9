"""Build a teacher cache with Ray tasks. ``python -m jobs.build_cache CONFIG [k.k=v …]``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial

from jobs.entry import config_command
from jobs.observability.build_observer import BuildObserver, BuiltPart
from jobs.observability.log import emit, warn, warn_of_omissions
from jobs.observability.progress import ProgressView
from jobs.paths import with_absolute_paths
from jobs.ray.cluster import cluster, cpus_only, num_local_tasks
from jobs.ray.fan_out import fan_out
from pipeline import storage
from pipeline.cache.build.blocks import BlockPlan
from pipeline.cache.build.build_log import BuildLogWriter, remove_logs
from pipeline.cache.build.class_means import ClassSums, add_up
from pipeline.cache.build.commit import (
    CommitSummary,
    files_present,
    is_dangling,
    read_commit_summaries,
    revoke,
)
from pipeline.cache.build.context import cache_config, prepare
from pipeline.cache.build.encodings import with_encodings
from pipeline.cache.build.header_claim import check_without_weights
from pipeline.cache.build.manifest import find_relabelled, publish_manifest, read_manifest, read_sums, read_table
from pipeline.cache.build.part import BusyTime, PartTask, build_part
from pipeline.cache.build.shard_index import IndexTask, restore_index
from pipeline.cache.format import layout
from pipeline.cache.format.header import find_header
from pipeline.cache.plan.free_space import check_space
from pipeline.cache.plan.pixel_sample import sample_pixels
from pipeline.cache.plan.plan_inputs import check_labels, collect_plan_inputs
from pipeline.cache.read.labels import cached_labels, reading_rules
from pipeline.cache.read.reader import open_cache
from pipeline.core.errors import CacheError, ShardError
from pipeline.core.redaction import quoted, redact
from pipeline.core.threads import map_ordered
from pipeline.models import random_weights_warnings, unreadable_weights
from pipeline.shards.labels import domain_warning, label_warning
from pipeline.shards.omissions import Omissions
from pipeline.shards.publish import index_name
from pipeline.shards.shard_urls import report_moved, urls_by_id
from pipeline.storage.config_files import load_config
from pipeline.tasks import task_of
from schemas.cache_format import FileRef, Manifest
from schemas.config import Config, DataConfig, RayConfig

_SIZE_THREADS = 16
# Files of up to 16 MB. Many, so that the driver receives few sums; few enough that a retry is cheap.
SUMS_PER_TASK = 256
_NUM_NAMED = 5


def build_cache(config: Config) -> Manifest:
    """Builds every part that has no commit, then publishes the manifest. A repeated call resumes.

    Raises:
        CacheError: the cache was begun by another config or teacher, or contains shards that this config lacks.
        ShardError: a shard is missing, damaged, or changed, or no sample has the member ``data.label``.
        ResourceError: no node could run a task.
        StorageInputError: a local disk has too little room for the cache.
    """
    config = with_encodings(with_absolute_paths(config))
    cache = cache_config(config)
    assert config.data.shards is not None
    by_id = urls_by_id(config.data.shards)
    storage.probe(cache.url)
    relabelled = find_relabelled(cache.url)
    commits = read_commit_summaries(cache.url)
    sizes = check_shards(cache.url, by_id, commits)
    inputs = sample_pixels(collect_plan_inputs(config, cache, by_id, sizes, commits))
    check_labels(inputs)
    _warn(*random_weights_warnings({"teacher": config.teacher}))
    _warn(*check_space(inputs, num_tasks=num_local_tasks(config.ray)))
    with cluster(config.ray):
        if not _needs_no_weights(config, by_id, commits):
            # One small task first: it detects a wrong teacher or another build's cache before any part is queued.
            first, name = [task_config(config, by_id)], "the header of the cache"
            for _, warnings in fan_out(prepare, first, config.ray, what="a cache task", name=lambda _: name):
                _warn(*warnings)
        _build_parts(config, by_id, commits)
        manifest = publish_manifest(cache.url, by_id, add_up=partial(sum_in_tasks, config.ray))
    remove_logs(cache.url)
    if relabelled is not None and relabelled.labels is not None and manifest.labels is None:
        command = f"stillroom cache relabel {quoted(cache.url)} --label {reading_rules(relabelled.labels.data).label}"
        moved = "" if relabelled.base == manifest.base else " --shards (as before)"
        _warn(f"the cache again has the labels of its build; to relabel it, run: {command}{moved}")
    labels = cached_labels(open_cache(cache.url))
    found = (label_warning(labels, config.data, finished_cache=cache.url), domain_warning(labels, config.data))
    _warn(*filter(None, found))
    return manifest


def _warn(*warnings: str) -> None:
    for warning in warnings:
        warn(f"cache: {warning}")


def _needs_no_weights(config: Config, by_id: dict[str, str], commits: list[CommitSummary]) -> bool:
    """Whether no part is missing, so that the header's fingerprint replaces weights that are unavailable.

    Raises:
        CacheError: another config began the cache.
    """
    assert config.cache is not None
    pretrained = "pretrained weights are not fetched" if config.teacher.weights == "pretrained" else None
    reason = pretrained or unreadable_weights(config.teacher)
    header = None if reason is None else find_header(config.cache.url)
    if header is None:
        return False
    present = files_present(config.cache.url)
    valid = [commit for commit in commits if commit.shard_id in by_id and not is_dangling(commit, present)]
    if plan_tasks(config, by_id, valid):
        return False
    check_without_weights(header, config)
    _warn(
        f"teacher.weights was not compared ({reason}): every part is committed, and the rest of the config has "
        f"fingerprint {header.fingerprint}"
    )
    return True


def check_shards(cache_url: str, by_id: dict[str, str], commits: Sequence[CommitSummary]) -> dict[str, int]:
    """Checks the shards against the cache before a build. Writes nothing. Returns the bytes of each shard.

    Raises:
        CacheError: the config lacks shards of the finished cache, which would lose them.
        ShardError: a shard is missing, or has a different size from when its parts were built.
    """
    lost = sorted(_finished_shards(cache_url, commits) - by_id.keys())
    if lost:
        raise CacheError(
            f"this config lacks {len(lost)} shards of the finished cache, which would lose them",
            code="cache.lost-shards",
            where=redact(cache_url),
            got=", ".join(lost[:_NUM_NAMED]) + (", ..." if len(lost) > _NUM_NAMED else ""),
            next_step="name all shards in data.shards, or build into another cache.url",
        )
    # A build writes no file with a longer name than an index.
    storage.check_names(cache_url, map(index_name, by_id))
    sizes = _sizes(by_id)
    for commit in commits:
        if commit.shard_id in sizes and sizes[commit.shard_id] != commit.shard_size_bytes:
            raise ShardError(
                "this shard changed since its parts were built",
                code="shard.changed-since-build",
                where=redact(by_id[commit.shard_id]),
                got=f"{sizes[commit.shard_id]} bytes",
                expected=f"{commit.shard_size_bytes} bytes",
                next_step="restore the shard, or build into another cache.url",
            )
    return sizes


def _finished_shards(cache_url: str, commits: Sequence[CommitSummary]) -> set[str]:
    if not storage.exists(storage.join(cache_url, layout.MANIFEST)):
        return set()
    try:
        return set(read_table(cache_url, read_manifest(cache_url)[0].shards)["shard_id"].to_pylist())
    except CacheError:
        # A damaged manifest or table is published again; it can only have named shards with commits.
        return {commit.shard_id for commit in commits}


def _sizes(by_id: dict[str, str]) -> dict[str, int]:
    """Bytes of each shard: by a listing of folders with many shards, and else by one request a shard."""
    by_folder: defaultdict[str, list[str]] = defaultdict(list)
    for url in by_id.values():
        by_folder[url.rpartition("/")[0]].append(url)
    listed: dict[str, int] = {}
    for folder, urls in by_folder.items():
        if storage.is_listing_cheaper(folder, len(urls)):
            listed |= {storage.join(folder, name): size for name, size in storage.sizes_in_folder(folder).items()}
    unlisted = [url for url in by_id.values() if url not in listed]
    with report_moved([*by_id.values()], "append data.shards={}"):
        listed |= zip(unlisted, map_ordered(storage.size, unlisted, threads=_SIZE_THREADS), strict=True)
    return {shard: listed[url] for shard, url in by_id.items()}


def _build_parts(config: Config, by_id: dict[str, str], commits: list[CommitSummary]) -> None:
    assert config.cache is not None
    commits, lost_indexes = _valid_commits(config, by_id, commits)
    ray = cpus_only(config.ray)
    list(fan_out(restore_index, lost_indexes, ray, what="an index task", name=lambda task: redact(task.shard_url)))
    tasks = plan_tasks(config, by_id, commits)
    num_done = len(commits)
    observer = BuildObserver(config, tasks, num_shards=len(by_id))
    observer.begin()
    omissions: dict[str, Omissions] = {}
    try:
        with (
            BuildLogWriter(config.cache.url, num_parts=num_done + len(tasks), num_before=num_done) as log,
            ProgressView("cache", num_done + len(tasks), done=num_done) as progress,
        ):
            built = fan_out(_build, tasks, config.ray, what="a cache task", observer=observer)
            for done, (task, part) in enumerate(built, start=1):
                # All parts that read the whole shard report the same omissions, the others none.
                if part.omissions.counts:
                    omissions[task.shard_url] = part.omissions
                log.update(num_done + done)
                progress.update(num_done + done, observer.note(), panel=observer.panel)
    finally:
        observer.log_summary()
        warn_of_omissions("cache", omissions.values())


def _build(task: PartTask) -> BuiltPart:
    busy = BusyTime()
    omissions = Omissions()
    return BuiltPart(build_part(task, busy, omissions), busy.seconds, omissions)


def _valid_commits(
    config: Config, by_id: dict[str, str], commits: list[CommitSummary]
) -> tuple[list[CommitSummary], list[IndexTask]]:
    """The commits of these shards whose files exist, and tasks for their missing indexes. Revokes dangling commits."""
    assert config.cache is not None
    url = config.cache.url
    commits = [commit for commit in commits if commit.shard_id in by_id]
    present = files_present(url)
    dangling = [commit for commit in commits if is_dangling(commit, present)]
    if dangling:
        emit(f"cache: {len(dangling)} dangling commits: their files are missing and will be rebuilt", event="dangling")
        revoke(url, dangling)
    valid = [commit for commit in commits if not is_dangling(commit, present)]
    lost = {commit.shard_id: commit.index_sha256 for commit in valid if commit.index not in present}
    small = task_config(config, by_id)
    return valid, [IndexTask(small, by_id[shard], sha256) for shard, sha256 in lost.items()]


def task_config(config: Config, by_id: dict[str, str]) -> Config:
    """The config for tasks, without the list of shards: 100,000 URLs take megabytes, and a task names its shard.

    It is equal for all tasks of a build, since a worker reuses its teacher while the config stays equal.
    """
    data = config.data.model_copy(update={"shards": next(iter(by_id.values())), "val_shards": None})
    return config.model_copy(update={"data": data})


def plan_tasks(config: Config, by_id: dict[str, str], commits: Sequence[CommitSummary]) -> list[PartTask]:
    """A task for each part without a commit."""
    assert config.cache is not None
    small = task_config(config, by_id)
    missing = BlockPlan.of(config).missing_by_shard(
        by_id, ((commit.shard_id, commit.block) for commit in commits), cache_url=config.cache.url
    )
    return [PartTask(small, by_id[shard], block) for shard, blocks in missing.items() for block in blocks]


def sum_in_tasks(ray: RayConfig, cache_url: str, refs: Sequence[FileRef]) -> ClassSums:
    """The sum over all files, read by tasks: those of 100,000 shards have up to 1.6 TB, too much for one machine."""
    chunks = [refs[start : start + SUMS_PER_TASK] for start in range(0, len(refs), SUMS_PER_TASK)]
    sums = fan_out(
        partial(read_sums, cache_url),
        chunks,
        cpus_only(ray),
        what="a task that adds class sums",
        name=lambda refs: f"{refs[0].path} and {len(refs) - 1} more in {redact(cache_url)}",
    )
    return add_up(chunk_sums for _, chunk_sums in sums)


def describe(manifest: Manifest, data: DataConfig) -> str:
    """The line at the end of a build."""
    skipped = sum(manifest.skipped.values())
    # One figure: a teacher of some of the heads has none in the others.
    metrics = task_of(data).teacher_metrics(manifest.statistics)
    measured = [f", teacher {metric} {share:.1%}" for metric, share in metrics.items() if share is not None]
    teacher = measured[0] if measured else ""
    return (
        f"cache: {manifest.num_ok} images x {manifest.num_views} views in {manifest.num_shards} shards, "
        f"{manifest.size_bytes / 1e6:.1f} MB, {skipped} skipped{teacher}"
    )


def main(source: str, overrides: list[str]) -> None:
    config = load_config(source, overrides)
    emit(describe(build_cache(config), config.data), event="end")


if __name__ == "__main__":
    config_command("build_cache", main)
