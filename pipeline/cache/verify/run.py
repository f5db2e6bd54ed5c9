"""The whole of a verification: every file once, in threads, in the memory of a row group a thread."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from pipeline import storage
from pipeline.cache.build.class_means import ClassSums, encode_means, merge
from pipeline.cache.build.commit import file_digest
from pipeline.cache.build.imported_means import encode_stored, imported_sha256
from pipeline.cache.format import layout
from pipeline.cache.format.files import read_file, read_parquet
from pipeline.cache.format.header import no_cache
from pipeline.cache.verify.records import CompressedCommit, StructuredRows, check_bytes, read_records
from pipeline.cache.verify.report import Findings, VerifyReport
from pipeline.cache.verify.shard import ShardTask, check_shard
from pipeline.core.errors import CacheError
from pipeline.core.redaction import redact
from pipeline.core.temporary import temporary_folder
from pipeline.core.threads import map_ordered
from schemas.cache_format import Header, Manifest

Progress = Callable[[int, int], None]
"""Called with the number of shards done and of all."""


def verify_cache(
    cache_url: str,
    *,
    shard_urls: Mapping[str, str] | None = None,
    threads: int = 1,
    allowed_levels: int = 0,
    progress: Progress | None = None,
) -> VerifyReport:
    """Holds every file of a cache to its digest, to what names it and to what it has to contain.

    Args:
        shard_urls: where images are, by shard id, for the canaries; of other shards, where the build found them.
        threads: shards that are checked at a time.
        allowed_levels: how far block means of canaries may differ, in uint8 levels; 0: pixels must be the same.

    Raises:
        CacheError: there is no cache here.
        StorageInputError: the URL is refused.
    """
    entries = storage.entries(cache_url)
    if not any(entry.path in (layout.HEADER, layout.MANIFEST) or layout.is_commit(entry.path) for entry in entries):
        raise no_cache(cache_url)
    findings = Findings()
    records = read_records(cache_url, entries, findings)
    tasks = _tasks(cache_url, records, {**records.shard_urls, **(shard_urls or {})}, allowed_levels)
    sums: list[ClassSums] = []
    whole = records.complete
    results = map_ordered(check_shard, tasks, threads=threads, name="verify")
    for done, result in enumerate(results, start=1):
        findings.merge(result.findings)
        whole &= not result.lost_sums
        if result.sums is not None:
            sums = [merge([*sums, result.sums])]
        if progress is not None:
            progress(done, len(tasks))
    _check_ownerless(cache_url, entries, records, findings)
    if records.header is not None and imported_sha256(records.header) is not None:
        _check_imported(cache_url, records.header, records.manifest, findings)
    elif records.manifest is not None:
        _check_class_means(cache_url, records.manifest, sums if whole else None, findings)
    return VerifyReport.of(
        redact(cache_url),
        fingerprint=None if records.header is None else records.header.fingerprint,
        findings=findings,
        unnamed=records.unnamed(entries),
    )


def _tasks(cache_url: str, records: StructuredRows, urls: Mapping[str, str], allowed_levels: int) -> list[ShardTask]:
    by_shard: defaultdict[str, list[CompressedCommit]] = defaultdict(list)
    for commit in records.commits:
        by_shard[commit.standing.shard_id].append(commit)
    return [
        ShardTask(cache_url, records, commits, urls.get(shard), allowed_levels) for shard, commits in by_shard.items()
    ]


def _check_ownerless(
    cache_url: str, entries: Sequence[storage.Entry], records: StructuredRows, findings: Findings
) -> None:
    """Parts and class sums whose commit cannot be read still carry the beginning of their digest in their name."""
    known = {commit.path for commit in records.commits}
    for entry in entries:
        owner = layout.owner(entry.path)
        commit_path = None if owner is None else layout.commit_path(*owner)
        named = commit_path in records.broken or entry.path in records.in_manifest
        if not named or commit_path in known:
            continue
        with findings.told(entry.path), temporary_folder() as scratch:
            local = storage.local_copy(storage.join(cache_url, entry.path), Path(scratch))
            sha16 = PurePosixPath(entry.path).stem.rpartition(".")[2]
            findings.expect(entry.path, "this file is not the one of its name", file_digest(local)[:16], sha16)


def _check_class_means(cache_url: str, manifest: Manifest, sums: list[ClassSums] | None, findings: Findings) -> None:
    """The class means from the sums of all shards again, bit for bit; ``None``: some sums are lost."""
    ref, path = manifest.class_means, layout.CLASS_MEANS
    if sums is not None:
        # Those of the build go with its labels.
        wants_means = bool(sums) and manifest.labels is None
        findings.expect(layout.MANIFEST, "this manifest names class means", ref is not None, wants_means)
    if ref is None:
        return
    findings.expect(layout.MANIFEST, "this manifest names another file", ref.path, path)
    with findings.told(path):
        findings.checked["class means"] += 1
        data = read_file(cache_url, path)
        check_bytes(data, ref)
        if sums is None:
            findings.not_checked["class means against class sums: a file of these is damaged"] += 1
        elif sums and not _same_table(data, encode_means(sums[0], fingerprint=manifest.fingerprint)):
            raise CacheError("these class means are not those of the class sums")


def _check_imported(cache_url: str, header: Header, manifest: Manifest | None, findings: Findings) -> None:
    """The kept JSON by its digest in the header, and the class means from it again, bit for bit."""
    with findings.told(layout.IMPORTED_MEANS):
        made = encode_stored(cache_url, header)
        if manifest is None:
            return
        findings.expect(layout.MANIFEST, "this manifest names class means", manifest.class_means is not None, True)
        if manifest.class_means is None:
            return
        with findings.told(layout.CLASS_MEANS):
            findings.checked["class means"] += 1
            data = read_file(cache_url, layout.CLASS_MEANS)
            check_bytes(data, manifest.class_means)
            if not _same_table(data, made):
                raise CacheError("these class means are not those of the imported file")


def _same_table(one: bytes, other: bytes) -> bool:
    return read_parquet(one).equals(read_parquet(other), check_metadata=True)
