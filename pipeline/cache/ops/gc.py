"""Remove what no commit names: files of builders that were killed or lost a race, and their temporary files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline import storage
from pipeline.cache.build.build_log import SILENT_S, find_running_build
from pipeline.cache.build.commit import is_unused, named_files, stream_commits
from pipeline.cache.build.manifest import read_manifest, read_table
from pipeline.cache.format import layout
from pipeline.cache.format.header import no_cache, read_header
from pipeline.core.errors import CacheError
from pipeline.core.redaction import quoted, redact


@dataclass(frozen=True, slots=True)
class GcReport:
    """Facts for a screen or for ``--json``. Bytes are of the files; ``removed`` would be, under ``dry_run``."""

    url: str
    dry_run: bool
    removed: tuple[str, ...]
    freed_bytes: int
    num_young: int
    """Files that nothing names and that may be the work of a running builder: they were kept."""
    num_former: int
    """Tables and class means that an extension replaced, and that were kept."""
    former_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def collect_garbage(
    cache_url: str, *, min_age_s: float, former: bool = False, dry_run: bool = False, now_s: float | None = None
) -> GcReport:
    """Removes files that neither a commit nor the manifest names. Files of other names than a build gives stay.

    Args:
        min_age_s: younger files stay: a running builder publishes a part before the commit that names it.
        former: also what an extension replaced, which runs that were begun before it still read.
        now_s: seconds since 1970.

    Raises:
        CacheError: there is no cache here, or a commit or the manifest is damaged: then nobody can say what it names.
    """
    read_header(cache_url)
    now_s = time.time() if now_s is None else now_s
    # Listed before the commits are read: what is committed in between is there, and named.
    entries = storage.entries(cache_url)
    is_quiet = all(_is_old(entry, now_s - min_age_s) for entry in entries)
    garbage = _garbage(cache_url, entries)
    kept = [entry for entry in entries if entry.path.startswith(layout.FORMER) and not entry.is_temporary]
    if former:
        garbage, kept = garbage + kept, []
    # A builder may be about to commit a part of an index that it found here, however old; nothing renews its time.
    old = [
        entry
        for entry in garbage
        if _is_old(entry, now_s - min_age_s) and (is_quiet or not layout.is_index(entry.path))
    ]
    if not dry_run:
        for entry in old:
            storage.delete(storage.join(cache_url, entry.path))
    return GcReport(
        url=redact(cache_url),
        dry_run=dry_run,
        removed=tuple(entry.path for entry in old),
        freed_bytes=sum(entry.size_bytes for entry in old),
        num_young=len(garbage) - len(old),
        num_former=len(kept),
        former_bytes=sum(entry.size_bytes for entry in kept),
    )


def remove_unused_header(
    cache_url: str, *, force: bool = False, dry_run: bool = False, now_s: float | None = None
) -> GcReport:
    """Removes the header of a cache to which nothing is committed, and what would bind a build with another header: its
    indexes, its imported class means and its build logs.

    A builder that commits between the check and the removal keeps its header, and this raises. One that commits later
    claims the cache again, or stops because another builder has claimed it: see ``_publish_commit`` of
    ``pipeline.cache.build.part``.

    Args:
        force: also while a build is logged as running.
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
        # Last: what is left by an interruption is removed by running this again.
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
        num_young=0,
        num_former=0,
        former_bytes=0,
    )


def _check_unused(cache_url: str) -> None:
    if not is_unused(cache_url):
        raise CacheError(
            "this header is in use: parts are committed under it",
            code="cache.header-in-use",
            where=redact(cache_url),
            next_step="build into another cache.url; to discard this cache, delete its folder",
        )


def _check_no_running_build(cache_url: str, now_s: float) -> None:
    log = find_running_build(cache_url, now_s=now_s)
    if log is not None:
        where = redact(cache_url)
        raise CacheError(
            "a build of this cache is logged as running",
            code="cache.build-running",
            where=where,
            got=f"process {log.process} on {log.host}, heard from {max(now_s - log.renewed_s, 0):.0f} s ago",
            expected=f"no record of a build, or one that is {SILENT_S:.0f} s old",
            next_step="stop that build, or wait; if it was killed, run: "
            f"stillroom cache gc {quoted(cache_url)} --unused-header --force",
        )


def _is_bound_to_header(path: str) -> bool:
    return layout.is_index(path) or path == layout.IMPORTED_MEANS or path.startswith(f"{layout.LOG}/")


def _is_old(entry: storage.Entry, limit_s: float) -> bool:
    """Of a file whose time the store does not tell, nobody knows."""
    return entry.modified_s is not None and entry.modified_s <= limit_s


def _garbage(cache_url: str, entries: Sequence[storage.Entry]) -> list[storage.Entry]:
    ours = [entry.path for entry in entries if layout.owner(entry.path) is not None or layout.is_index(entry.path)]
    stray = set(ours) - named_files(stream_commits(cache_url)) - _named_by_manifest(cache_url)
    return [entry for entry in entries if entry.is_temporary or entry.path in stray]


def _named_by_manifest(cache_url: str) -> set[str]:
    """Parts and indexes that a training reads, whatever has become of their commits."""
    if not storage.exists(storage.join(cache_url, layout.MANIFEST)):
        return set()
    manifest = read_manifest(cache_url)[0]
    shards = read_table(cache_url, manifest.shards)["shard_id"].to_pylist()
    parts = read_table(cache_url, manifest.parts)["path"].to_pylist()
    return {*parts, *(layout.index_path(shard) for shard in shards)}
