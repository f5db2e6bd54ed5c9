"""Verify a teacher cache: its files against each other and, given a config, against its teacher."""

from __future__ import annotations

from jobs.observability.progress import ProgressView
from jobs.paths import with_absolute_paths
from pipeline.cache.verify import Recomputed, VerifyReport, load_live, recompute, verify_cache
from pipeline.cache.verify.shard import SHARD_MISSING
from pipeline.shards.shard_urls import shard_ids, shard_urls
from pipeline.storage.config_files import load_config
from schemas.config import Config

_NUM_PRINTED = 20


def verify(
    cache_url: str,
    *,
    shards: str | None = None,
    threads: int = 1,
    config: Config | None = None,
    num_rows: int = 256,
    allow_pixel_drift: int = 0,
) -> VerifyReport:
    """Every file of the cache; with a config, the teacher's words on ``num_rows`` rows too. Progress on standard error.

    Args:
        shards: where the images are; default: ``data.shards`` of the config, or where the build found them.
        allow_pixel_drift: levels of 255 by which canaries may differ on this machine.

    Raises:
        CacheError: there is no cache here.
        ConfigError, ModelError: the config names no teacher that can be loaded.
    """
    # First, since a wrong config should not be found after an hour of reading.
    live = None if config is None else load_live(with_absolute_paths(config))
    named = shards if shards is not None or live is None else live.config.data.shards
    urls = None if named is None else shard_urls(named, key="data.shards" if shards is None else "--shards")
    by_id = {} if urls is None else dict(zip(shard_ids(urls), urls, strict=True))
    with ProgressView("verify", 0) as progress:
        report = verify_cache(
            cache_url,
            shard_urls=by_id,
            threads=threads,
            allowed_levels=allow_pixel_drift,
            progress=lambda done, total: progress.update(done, "shards", total=total),
        )
    if live is None:
        return report
    with ProgressView("recompute", 0) as progress:
        return report.joined(
            *recompute(
                cache_url,
                live,
                num_rows=num_rows,
                shard_urls=by_id,
                progress=lambda done, total: progress.update(done, "views", total=total),
            )
        )


def read_config(source: str | None, overrides: list[str]) -> Config | None:
    """The config of ``--config``, if there is one."""
    return None if source is None else load_config(source, overrides)


def describe(report: VerifyReport) -> str:
    """The lines that the command prints."""
    lines = [str(problem) for problem in report.problems[:_NUM_PRINTED]]
    if (more := report.num_problems - len(lines)) > 0:
        lines.append(f"… and {more} more problems")
    lines += _counts("checked", report.checked) + _counts("not checked", report.not_checked)
    if SHARD_MISSING in report.not_checked:
        lines.append("  to check these canaries, append --shards 'NEW_FOLDER/….tar' (data.shards-moved)")
    if report.drift:
        most = max(report.drift)
        count = sum(report.drift.values())
        lines.append(f"pixel drift: {count} canaries differ, block means by up to {most} of 255, which was allowed")
    if report.recomputed is not None:
        lines.append(f"recomputed:  {_recomputed(report.recomputed)}")
    if report.num_unnamed:
        lines.append(f"{report.num_unnamed} files that nothing names, first {', '.join(report.unnamed[:3])}")
        lines.append("  no harm; stillroom cache gc removes what killed builders left")
    if not report.ok:
        lines.append("next: remove what is damaged and run stillroom cache build CONFIG, which makes it anew;")
        lines.append("  a cache whose rows are wrong under right digests has to be built into another cache.url")
    verdict = "no problems" if report.ok else f"{report.num_problems} problems"
    return "\n".join([*lines, f"{report.url}: {verdict}"])


def _counts(title: str, counts: dict[str, int]) -> list[str]:
    return [f"{title + ':':<13}{', '.join(f'{count} {name}' for name, count in counts.items())}"] if counts else []


def _recomputed(found: Recomputed) -> str:
    return (
        f"{found.rows} rows, {found.identical} with the same bits, largest difference {found.largest_difference:.2g} "
        f"standard deviations; {found.same_environment} rows were built in this numeric environment"
    )
