"""Read the labels of a finished cache again from its shards: ``stillroom cache relabel``."""

from __future__ import annotations

from jobs.observability.progress import ProgressView
from pipeline import storage
from pipeline.cache.ops.relabel import Relabelling, relabel
from pipeline.shards.shard_urls import shard_ids, shard_urls


def relabel_cache(cache_url: str, *, label: str | None, shards: str | None, threads: int) -> Relabelling:
    """Progress on standard error.

    Args:
        shards: where the shards are; default: where the build found them.

    Raises:
        StillroomError: as ``relabel``.
    """
    urls = [] if shards is None else [storage.absolute(url) for url in shard_urls(shards, key="--shards")]
    with ProgressView("relabel", 0) as progress:
        return relabel(
            cache_url,
            label=label,
            shard_urls=dict(zip(shard_ids(urls), urls, strict=True)),
            threads=threads,
            progress=lambda done, total: progress.update(done, "shards", total=total),
        )


def describe(found: Relabelling) -> str:
    """The lines that the command prints."""
    statistics = found.statistics
    top1 = f"{statistics.top1_hits / statistics.labelled:.1%}, on view 0" if statistics.labelled else "not known"
    lines = [f"labels: {found.count} (data.label is {found.label})", f"teacher top-1: {top1}"]
    if 0 < found.num_given < found.count.num_shards:
        others = found.count.num_shards - found.num_given
        lines.append(f"shards: {found.num_given} read as --shards names them, {others} where the build found them")
    if found.num_given:
        lines.append("from now on the cache names these shards; configs that name data.shards have to name them too")
    if found.lost_means:
        lines.append("warning: class means came from the labels of the build and are left out; nd needs another build")
    return "\n".join(lines)
