"""Operations on a cache (inspect, verify, relabel, class means, garbage collection), and the text of their results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from jobs.observability.progress import ProgressView, duration
from jobs.paths import with_absolute_paths
from pipeline import storage
from pipeline.cache.build.context import current_context
from pipeline.cache.build.encodings import with_encodings
from pipeline.cache.ops.copy import CopyReport, copy_cache
from pipeline.cache.ops.export_means import ExportedMeans
from pipeline.cache.ops.gc import GcReport
from pipeline.cache.ops.inspect import CacheReport
from pipeline.cache.ops.relabel import Relabelling, relabel
from pipeline.cache.verify import Recomputed, VerifyReport, compare_with_sources, recompute, verify_cache
from pipeline.cache.verify.shard import SHARD_MISSING
from pipeline.shards.shard_urls import urls_by_id
from schemas.cache_format import Moments
from schemas.config import Config

NO_SOURCE = "outputs against the caches from which this one was derived (--source)"
_NUM_PROBLEMS = 20
_NUM_CLASSES = 10


def describe_cache(report: CacheReport) -> str:
    """The text of ``stillroom cache inspect``."""

    def text(value: object) -> str:
        if value is None:
            return "-"
        if isinstance(value, dict):
            return ", ".join(f"{key} {text(item)}" for key, item in value.items()) or "none"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    def line(name: str, value: object) -> str:
        if name.endswith("_s") and isinstance(value, float):
            name, value = name.removesuffix("_s"), duration(value)
        return f"{name.replace('_', ' '):<20}{text(value)}"

    def lines_of(name: str, value: object) -> list[str]:
        if name == "teacher_by_domain":
            return [line(f"  domain {domain}", metrics) for domain, metrics in report.teacher_by_domain.items()]
        return [line(name, value)]

    fields = asdict(report).items()
    lines = [text for name, value in fields if name != "warnings" for text in lines_of(name, value)]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in report.warnings)])


def verify(
    cache_url: str,
    *,
    shards: str | None = None,
    threads: int = 1,
    config: Config | None = None,
    num_rows: int = 256,
    allow_pixel_drift: int = 0,
    sources: Sequence[str] = (),
) -> VerifyReport:
    """Verifies every file of the cache; with a config, also the teacher outputs of ``num_rows`` rows. Progress goes to
    standard error.

    Args:
        shards: where the images are; default: ``data.shards`` of the config, or where the build read them.
        config: the config of the build.
        allow_pixel_drift: levels of 255 by which canaries may differ on this machine.
        sources: of a derived cache; its outputs are compared with those of the sources.

    Raises:
        CacheError: there is no cache at this URL.
        ConfigError: the cache was derived from other sources, or from none.
        ConfigError, ModelError: the config names no teacher that can be loaded.
    """
    # First, so that a wrong config does not fail after an hour of reading.
    context = None if config is None else current_context(with_encodings(with_absolute_paths(config), cache_url))
    if shards is not None:
        by_id = urls_by_id(shards, key="--shards")
    else:
        by_id = {} if context is None or context.config.data.shards is None else urls_by_id(context.config.data.shards)
    with ProgressView("verify", 0) as progress:
        report = verify_cache(
            cache_url,
            shard_urls=by_id,
            threads=threads,
            allowed_levels=allow_pixel_drift,
            progress=lambda done, total: progress.update(done, "shards", total=total),
        )
    if sources:
        with ProgressView("sources", 0) as progress:
            compare_with_sources(
                cache_url,
                sources,
                report,
                threads=threads,
                progress=lambda done, total: progress.update(done, "blocks", total=total),
            )
    elif report.derived is not None:
        report.not_checked[NO_SOURCE] += 1
    if context is None:
        return report
    with ProgressView("recompute", 0) as progress:
        report.recomputed = recompute(
            cache_url,
            context,
            report,
            num_rows=num_rows,
            shard_urls=by_id,
            progress=lambda done, total: progress.update(done, "views", total=total),
        )
    return report


def describe_verification(report: VerifyReport) -> str:
    """The text of ``stillroom cache verify``."""
    lines = [str(problem) for problem in report.problems[:_NUM_PROBLEMS]]
    if (num_more := report.num_problems - len(lines)) > 0:
        lines.append(f"… and {num_more} more problems")
    lines += _counts("checked", report.checked) + _counts("not checked", report.not_checked)
    if SHARD_MISSING in report.not_checked:
        lines.append("  to check these canaries, append --shards 'NEW_FOLDER/….tar' (data.shards-moved)")
    if report.drift:
        count, levels = sum(report.drift.values()), max(report.drift)
        lines.append(f"pixel drift: {count} canaries differ, block means by up to {levels} of 255, which was allowed")
    if report.recomputed is not None:
        lines.append(f"recomputed:  {_recomputed_text(report.recomputed)}")
    if report.num_unnamed:
        lines.append(f"{report.num_unnamed} files that nothing names, first {', '.join(report.unnamed[:3])}")
        lines.append("  harmless; stillroom cache gc removes what killed builders left")
    if not report.ok:
        lines.append("next: remove what is damaged and run stillroom cache build CONFIG, which rebuilds it;")
        lines.append("  a cache with wrong rows under right digests has to be built into another cache.url")
    verdict = "no problems" if report.ok else f"{report.num_problems} problems"
    return "\n".join([*lines, f"{report.url}: {verdict}"])


def _counts(title: str, counts: dict[str, int]) -> list[str]:
    return [f"{title + ':':<13}{', '.join(f'{count} {name}' for name, count in counts.items())}"] if counts else []


def _recomputed_text(recomputed: Recomputed) -> str:
    return (
        f"{recomputed.rows} rows, {recomputed.identical} with the same bits, largest difference "
        f"{recomputed.largest_difference:.2g} standard deviations; {recomputed.same_environment} rows were built in "
        "this numeric environment"
    )


def relabel_cache(cache_url: str, *, label: str | None, shards: str | None, threads: int) -> Relabelling:
    """Reads the labels of a finished cache again from its shards. Progress goes to standard error.

    Args:
        shards: where the shards are; default: where the build read them.

    Raises:
        StillroomError: as ``relabel`` does.
    """
    by_id = {} if shards is None else urls_by_id(shards, key="--shards")
    with ProgressView("relabel", 0) as progress:
        return relabel(
            cache_url,
            label=label,
            shard_urls={shard: storage.absolute(url) for shard, url in by_id.items()},
            threads=threads,
            progress=lambda done, total: progress.update(done, "shards", total=total),
        )


def describe_relabelling(relabelling: Relabelling) -> str:
    """The text of ``stillroom cache relabel``."""
    count = relabelling.count
    lines = [f"labels: {count} (data.label is {relabelling.label})"]
    for metric, share in [*relabelling.teacher_metrics.items()][:1]:
        lines.append(f"teacher {metric}: {'not known' if share is None else f'{share:.1%}, on view 0'}")
    if 0 < relabelling.num_given < count.num_shards:
        num_others = count.num_shards - relabelling.num_given
        lines.append(
            f"shards: {relabelling.num_given} read as --shards names them, {num_others} where the build read them"
        )
    if relabelling.num_given:
        lines.append("from now on the cache names these shards; configs that name data.shards have to name them too")
    if relabelling.lost_means:
        lines.append("warning: class means came from the labels of the build and are left out; nd needs another build")
    return "\n".join(lines)


def copy(source_url: str, destination_url: str, *, threads: int) -> CopyReport:
    """Copies a finished cache. Progress goes to standard error.

    Raises:
        StillroomError: as ``copy_cache`` does.
    """
    with ProgressView("copy", 0) as progress:
        return copy_cache(
            source_url,
            destination_url,
            threads=threads,
            progress=lambda done, total: progress.update(done, "shards", total=total),
        )


def describe_copy(report: CopyReport) -> str:
    """The text of ``stillroom cache copy``."""
    present = report.num_files - report.num_written
    lines = [f"left out: {', '.join(f'{count} {kind}' for kind, count in report.left_out.items()) or 'nothing'}"]
    lines.append(
        f"copied {report.num_written} of {report.num_files} files, {report.bytes_written / 1e6:.1f} of "
        f"{report.num_bytes / 1e6:.1f} MB; {present} were there with the same digest"
    )
    return "\n".join([*lines, f"{report.destination}: {report.num_shards} shards, all digests equal"])


def describe_means(means: ExportedMeans, out: str) -> str:
    """The line of ``stillroom cache means``."""
    names = ", ".join(map(str, means.absent[:_NUM_CLASSES])) + (", …" if len(means.absent) > _NUM_CLASSES else "")
    absent = f"; {len(means.absent)} classes have no mean: {names}" if means.absent else ""
    return f"class means: {means.num_written} classes of {means.embedding_dim} numbers in {out}{absent}"


def describe_moments(moments: Moments, *, is_new: bool) -> str:
    """The line of ``stillroom cache moments``."""
    mixed = f", {moments.num_mixed} of them mixed" if moments.num_mixed else ""
    skipped = sum(moments.skipped.values())
    left_out = [f"{skipped} samples without outputs"] if skipped else []
    left_out += [f"{moments.num_further} rows of the eval pass or of incomplete views"] if moments.num_further else []
    return (
        f"moments: {moments.num_rows} rows{mixed}; left out: {', '.join(left_out) or 'none'}; "
        f"{'written to' if is_new else 'already in'} {moments.table.path}, {moments.table.size_bytes / 1e6:.1f} MB"
    )


def describe_garbage(report: GcReport) -> str:
    """The text of ``stillroom cache gc``: one line for each file, and the sum."""
    verb, freed = ("would remove", "would free") if report.dry_run else ("removed", "freed")
    lines = [f"{verb} {path}" for path in report.removed]
    if report.num_recent:
        lines.append(
            f"left {report.num_recent} recent files, which a running build may be about to commit (see --min-age)"
        )
    if report.num_former_files:
        lines.append(
            f"left {report.num_former_files} tables that an extension replaced, or moments of an older manifest, "
            f"{report.former_bytes / 1e6:.1f} MB: runs that began before it read them; --former removes them"
        )
    return "\n".join([*lines, f"{report.url}: {len(report.removed)} files, {freed} {report.freed_bytes / 1e6:.1f} MB"])
