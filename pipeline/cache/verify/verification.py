"""Verifies a whole cache: reads each file once, shards in threads, a row group per thread in memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline import storage
from pipeline.cache.build.class_means import ClassSums, encode_means, merge
from pipeline.cache.build.commit import file_digest
from pipeline.cache.build.imported_means import encode_stored, imported_sha256
from pipeline.cache.format import layout
from pipeline.cache.format.files import read_parquet
from pipeline.cache.format.header import no_cache
from pipeline.cache.verify.records import CacheRecords, CompressedCommit, read_committed, read_records
from pipeline.cache.verify.report import Findings, VerifyReport
from pipeline.cache.verify.shard import ShardResult, check_shard
from pipeline.core.redaction import redact
from pipeline.core.temporary import temporary_folder
from pipeline.core.threads import map_ordered

_MAX_UNNAMED = 20

Progress = Callable[[int, int], None]
"""Called with the number of finished shards and of all shards."""


def verify_cache(
    cache_url: str,
    *,
    shard_urls: Mapping[str, str] | None = None,
    threads: int = 1,
    allowed_levels: int = 0,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compares every file of a cache with its digest, the records that name it, and its expected content.

    Args:
        shard_urls: where the images are, by shard id, for the canaries; default: where the build read them.
        threads: number of shards that are checked at a time.
        allowed_levels: allowed difference of the block means of canaries, in uint8 levels; 0: equal pixels.

    Raises:
        CacheError: there is no cache here.
        StorageInputError: the URL is refused.
    """
    entries = storage.entries(cache_url)
    if not any(entry.path in (layout.HEADER, layout.MANIFEST) or layout.is_commit(entry.path) for entry in entries):
        raise no_cache(cache_url)
    report = VerifyReport(url=redact(cache_url))
    records = read_records(cache_url, entries, report)
    commits_of_shard: defaultdict[str, list[CompressedCommit]] = defaultdict(list)
    for commit in records.commits:
        commits_of_shard[commit.summary.shard_id].append(commit)

    def check(shard: str) -> ShardResult:
        url = (shard_urls or {}).get(shard) or records.shard_url(shard)
        return check_shard(cache_url, records, commits_of_shard[shard], shard_url=url, allowed_levels=allowed_levels)

    sums: ClassSums | None = None
    has_all_sums = records.complete
    moment_sums_3 = np.zeros(3)
    for done, result in enumerate(map_ordered(check, [*commits_of_shard], threads=threads, name="verify"), start=1):
        report.merge(result.findings)
        has_all_sums &= not result.lost_sums
        moment_sums_3 += result.moment_sums_3
        if result.sums is not None:
            sums = result.sums if sums is None else merge([sums, result.sums])
        if progress is not None:
            progress(done, len(commits_of_shard))
    _check_files_without_commit(cache_url, entries, records, report)
    _check_class_means(cache_url, records, sums, report, has_all_sums=has_all_sums)
    if records.moments is not None:
        if records.complete and not report.num_problems:
            records.moments.compare(moment_sums_3, report)
        else:
            report.not_checked["moments against the rows: another file has a problem"] += 1
    unnamed = records.unnamed(entries)
    report.num_unnamed, report.unnamed = len(unnamed), tuple(unnamed[:_MAX_UNNAMED])
    report.fingerprint = None if records.header is None else records.header.fingerprint
    report.derived = None if records.header is None else records.header.derived
    return report


def _check_files_without_commit(
    cache_url: str, entries: Sequence[storage.Entry], records: CacheRecords, findings: Findings
) -> None:
    """Parts and class sums of a damaged commit: their names have the first characters of their digests."""
    with_commit = {commit.path for commit in records.commits}
    for entry in entries:
        owner = layout.owner(entry.path)
        commit_path = None if owner is None else layout.commit_path(*owner)
        is_named = commit_path in records.damaged or entry.path in records.manifest_parts
        if not is_named or commit_path in with_commit:
            continue
        with findings.capture(entry.path), temporary_folder() as scratch:
            local = storage.local_copy(storage.join(cache_url, entry.path), Path(scratch))
            sha16 = PurePosixPath(entry.path).stem.rpartition(".")[2]
            what = "the digest is not the one in the file name"
            findings.expect(entry.path, what, file_digest(local)[:16], sha16)


def _check_class_means(
    cache_url: str, records: CacheRecords, sums: ClassSums | None, findings: Findings, *, has_all_sums: bool
) -> None:
    """Computes the class means again, from the sums of all shards or from the imported JSON, and compares all bits."""
    header, manifest, path = records.header, records.manifest, layout.CLASS_MEANS
    is_known = has_all_sums
    expected: bytes | None = None
    if header is not None and imported_sha256(header) is not None:
        is_known = False
        with findings.capture(layout.IMPORTED_MEANS):
            # Also compares the JSON with its digest in the header.
            expected = encode_stored(cache_url, header)
            is_known = True
    # The sums are those of the build's labels.
    elif has_all_sums and sums is not None and manifest is not None and manifest.labels is None:
        expected = encode_means(sums, fingerprint=manifest.fingerprint)
    ref = None if manifest is None else manifest.class_means
    if is_known and manifest is not None:
        what = "whether this manifest names class means"
        findings.expect(layout.MANIFEST, what, ref is not None, expected is not None)
    if ref is None:
        return
    if not is_known:
        findings.not_checked["class means against their source: a file of it is damaged"] += 1
    findings.expect(layout.MANIFEST, "this manifest names another file", ref.path, path)
    with findings.capture(path, "class means"):
        data = read_committed(cache_url, ref.model_copy(update={"path": path}))
        if expected is not None:
            same = read_parquet(data).equals(read_parquet(expected), check_metadata=True)
            what = "whether these class means equal those of the class sums or of the imported file"
            findings.expect(path, what, same, True)
