"""What ``stillroom cache gc`` prints."""

from __future__ import annotations

from pipeline.cache.ops.gc import GcReport


def describe(report: GcReport) -> str:
    """One line a file, and a sum."""
    verb = "would remove" if report.dry_run else "removed"
    lines = [f"{verb} {path}" for path in report.removed]
    if report.num_young:
        lines.append(f"kept {report.num_young} files that a running build may be about to commit (see --min-age)")
    if report.num_former:
        lines.append(
            f"kept {report.num_former} tables that an extension replaced, {report.former_bytes / 1e6:.1f} MB: "
            "runs that were begun before it read them; --former removes them"
        )
    freed = "would free" if report.dry_run else "freed"
    return "\n".join([*lines, f"{report.url}: {len(report.removed)} files, {freed} {report.freed_bytes / 1e6:.1f} MB"])
