"""Removes files that no commit names: those of builders that were killed or lost a race, and temporary files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline import storage
from pipeline.cache.build.build_log import STALE_S, find_running_build
from pipeline.cache.build.commit import is_unused, named_files, stream_commits
from pipeline.cache.build.manifest import read_manifest, read_table
from pipeline.cache.format import layout
from pipeline.cache.format.header import no_cache, read_header
from pipeline.cache.read.moments import read_moments_record
from pipeline.core.errors import CacheError
from pipeline.core.hashing import digest
from pipeline.core.redaction import quoted, redact


@dataclass(frozen=True, slots=True)
class GcReport:
    """The result for a screen or for ``--json``.

    Attributes:
        removed: paths that were removed, or would be without ``dry_run``.
        freed_bytes: size of these files.
        num_recent: files that no record names, but that may belong to a running builder; they are not removed.
        num_former_files: tables and class means that an extension replaced, and moments of an older manifest, that are
            not removed; ``former_bytes`` is their size.
    """

    url: str
    dry_run: bool
    removed: tuple[str, ...]
    freed_bytes: int
    num_recent: int
    num_former_files: int
    former_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, and ``num_young`` and ``num_former``, the former names of two of them."""
        return {**asdict(self), "num_young": self.num_recent, "num_former": self.num_former_files}


def collect_garbage(
    cache_url: str, *, min_age_s: float, former: bool = False, dry_run: bool = False, now_s: float | None = None
) -> GcReport:
    """Removes files that neither a commit nor the manifest names, if a build gives such names.

    Args:
        min_age_s: younger files stay, because a running builder publishes a part before the commit that names it.
        former: also removes files that an extension replaced, and moments of an older manifest. Runs with an older
            manifest read them.
        now_s: seconds since 1970.

    Raises:
        CacheError: there is no cache here; or a commit or the manifest is damaged, so that the named files are unknown.
    """
    read_header(cache_url)
    now_s = time.time() if now_s is None else now_s
    # Listed before the commits are read, so that every listed file of a new commit is named.
    entries = storage.entries(cache_url)
    unnamed = _unnamed(cache_url, entries)
    former_entries = _former(cache_url, entries)
    if former:
        unnamed, former_entries = unnamed + former_entries, []
    # A running builder may be about to commit a part that uses an index which it did not write. The index may then be
    # old although other files are recent.
    is_idle = all(_is_old(entry, now_s - min_age_s) for entry in entries)
    removed = [
        entry for entry in unnamed if _is_old(entry, now_s - min_age_s) and (is_idle or not layout.is_index(entry.path))
    ]
    if not dry_run:
        for entry in removed:
            storage.delete(storage.join(cache_url, entry.path))
    return GcReport(
        url=redact(cache_url),
        dry_run=dry_run,
        removed=tuple(entry.path for entry in removed),
        freed_bytes=sum(entry.size_bytes for entry in removed),
        num_recent=len(unnamed) - len(removed),
        num_former_files=len(former_entries),
        former_bytes=sum(entry.size_bytes for entry in former_entries),
    )


def remove_unused_header(
    cache_url: str, *, force: bool = False, dry_run: bool = False, now_s: float | None = None
) -> GcReport:
    """Removes the header of a cache without commits, and its indexes, imported class means and build logs: a build with
    another header cannot use these.

    If a builder commits during the removal, the header is created again and this function raises. A builder that
    commits later claims the cache again, or stops if another builder has claimed it.

    Args:
        force: removes the header even if a build is logged as running.
        now_s: seconds since 1970.

    Raises:
        CacheError: there is no header, something is committed, or a build is logged as running.
    """
    url = storage.join(cache_url, layout.HEADER)
    header = storage.read_if_exists(url, max_bytes=storage.MAX_RECORD_BYTES)
    if header is None:
        raise no_cache(cache_url)
    _check_unused(cache_url)
    if not force:
        _check_no_running_build(cache_url, time.time() if now_s is None else now_s)
    entries = [entry for entry in storage.entries(cache_url) if _is_bound_to_header(entry.path)]
    if not dry_run:
        for entry in entries:
            storage.delete(storage.join(cache_url, entry.path))
        # Last, so that the command can be repeated after an interruption.
        storage.delete(url)
        try:
            _check_unused(cache_url)
        except CacheError:
            storage.create(url, header)
            raise
    return GcReport(
        url=redact(cache_url),
        dry_run=dry_run,
        removed=(*(entry.path for entry in entries), layout.HEADER),
        freed_bytes=sum(entry.size_bytes for entry in entries) + len(header),
        num_recent=0,
        num_former_files=0,
        former_bytes=0,
    )


def _check_unused(cache_url: str) -> None:
    if not is_unused(cache_url):
        raise CacheError(
            "this header is in use: parts are committed under it",
            code="cache.header-in-use",
            where=redact(cache_url),
            next_step="build into another cache.url, or delete the folder to discard this cache",
        )


def _check_no_running_build(cache_url: str, now_s: float) -> None:
    log = find_running_build(cache_url, now_s=now_s)
    if log is not None:
        where = redact(cache_url)
        raise CacheError(
            "a build of this cache is logged as running",
            code="cache.build-running",
            where=where,
            got=f"process {log.process} on {log.host}, log renewed {max(now_s - log.renewed_s, 0):.0f} s ago",
            expected=f"no build log, or one that was not renewed for {STALE_S:.0f} s",
            next_step="stop that build, or wait until it ends; if it was killed, run: "
            f"stillroom cache gc {quoted(cache_url)} --unused-header --force",
        )


def _is_bound_to_header(path: str) -> bool:
    return layout.is_index(path) or path in (layout.IMPORTED_MEANS, layout.HEAD) or path.startswith(f"{layout.LOG}/")


def _is_old(entry: storage.Entry, limit_s: float) -> bool:
    """False if the store gives no time."""
    return entry.modified_s is not None and entry.modified_s <= limit_s


def _unnamed(cache_url: str, entries: Sequence[storage.Entry]) -> list[storage.Entry]:
    """Temporary files; parts, class sums and indexes that neither a commit nor the manifest names; unnamed moments."""
    built = {entry.path for entry in entries if layout.owner(entry.path) is not None or layout.is_index(entry.path)}
    unnamed = built - named_files(stream_commits(cache_url)) - _named_by_manifest(cache_url)
    unnamed |= _unnamed_moments(cache_url, entries)
    return [entry for entry in entries if entry.is_temporary or entry.path in unnamed]


def _unnamed_moments(cache_url: str, entries: Sequence[storage.Entry]) -> set[str]:
    """Tables of moments that no record names: its writer was killed before it created the record, or was slower."""
    paths = {entry.path for entry in entries if layout.moments_manifest(entry.path) is not None}
    records = {path for path in paths if layout.is_moments_record(path)}
    named = {read_moments_record(cache_url, path).table.path for path in records}
    return paths - records - named


def _former(cache_url: str, entries: Sequence[storage.Entry]) -> list[storage.Entry]:
    """Files that only runs with an older manifest read."""
    published = [entry for entry in entries if not entry.is_temporary]
    # A cache without a manifest has no moments.
    has_moments = any(layout.moments_manifest(entry.path) is not None for entry in published)
    current = {digest(read_manifest(cache_url)[1])[:16]} if has_moments else set[str]()
    return [
        entry
        for entry in published
        if entry.path.startswith(layout.FORMER) or layout.moments_manifest(entry.path) not in {None, *current}
    ]


def _named_by_manifest(cache_url: str) -> set[str]:
    """Parts and indexes that a training reads, even if their commits are missing."""
    if not storage.exists(storage.join(cache_url, layout.MANIFEST)):
        return set()
    manifest = read_manifest(cache_url)[0]
    shards = read_table(cache_url, manifest.shards)["shard_id"].to_pylist()
    parts = read_table(cache_url, manifest.parts)["path"].to_pylist()
    return {*parts, *(layout.index_path(shard) for shard in shards)}
