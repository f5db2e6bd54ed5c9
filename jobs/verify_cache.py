"""Verify a teacher cache: its files against each other and, on wish, against its teacher."""

from __future__ import annotations

from jobs.progress import ProgressView
from pipeline.cache.verify import VerifyReport, verify_cache

_NUM_PRINTED = 20


def verify(cache_url: str, *, shards: str | None = None, threads: int = 1) -> VerifyReport:
    """Every file of the cache, with progress on standard error.

    Raises:
        CacheError: there is no cache here.
    """
    with ProgressView("verify", 0) as progress:
        return verify_cache(
            cache_url,
            shards=shards,
            threads=threads,
            progress=lambda done, total: progress.update(done, "shards", total=total),
        )


def describe(report: VerifyReport) -> str:
    """The lines that the command prints."""
    lines = [str(problem) for problem in report.problems[:_NUM_PRINTED]]
    if (more := report.num_problems - len(lines)) > 0:
        lines.append(f"… and {more} more problems")
    lines += _counts("checked", report.checked) + _counts("not checked", report.not_checked)
    if report.num_unnamed:
        lines.append(f"{report.num_unnamed} files that nothing names, first {', '.join(report.unnamed[:3])}")
        lines.append("  no harm; stillroom cache gc removes what killed builders left")
    verdict = "no problems" if report.ok else f"{report.num_problems} problems"
    return "\n".join([*lines, f"{report.url}: {verdict}"])


def _counts(title: str, counts: dict[str, int]) -> list[str]:
    return [f"{title + ':':<13}{', '.join(f'{count} {name}' for name, count in counts.items())}"] if counts else []
