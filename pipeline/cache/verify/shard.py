"""One shard of a cache: its indexes, parts, class sums and canaries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.cache.build.class_means import ClassSums, decode_sums, merge
from pipeline.cache.build.commit import file_digest
from pipeline.cache.format import layout
from pipeline.cache.format.files import missing_file, read_file
from pipeline.cache.verify.images import ShardImages, check_canaries
from pipeline.cache.verify.part import PartCheck, PartContent, ReplayedShard
from pipeline.cache.verify.records import CacheRecords, CompressedCommit, check_digest, read_committed
from pipeline.cache.verify.report import Findings
from pipeline.core.errors import CacheError, StillroomError, StorageInputError
from pipeline.core.hashing import digest
from pipeline.core.redaction import redact
from pipeline.core.temporary import temporary_folder
from pipeline.shards.index import STATUSES, ShardIndex, decode_index
from pipeline.tasks import task_of
from schemas.cache_format import Commit, FileRef

SHARD_MISSING = "canaries: the shard is not available"
_NO_INDEX = "rows of parts: the index has a problem"
_NO_HEADER = "rows of parts: the header is not readable"
_NO_PLAN = "augmentation parameters and canaries: this version cannot replay the plan"
# A relabelled index may differ from the build's in labels and offsets.
_NOT_RELABELLED = ("shard_id", "keys", "status", "size", "width", "height", "content_hash")


@dataclass(slots=True)
class ShardResult:
    """
    Attributes:
        sums: class sums of the parts that the manifest names.
        lost_sums: some of these sums could not be read.
        moment_sums_3: ``MomentsCheck.sums`` of the parts that the manifest names.
    """

    findings: Findings = field(default_factory=Findings)
    sums: ClassSums | None = None
    lost_sums: bool = False
    moment_sums_3: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))


def check_shard(
    cache_url: str,
    records: CacheRecords,
    commits: list[CompressedCommit],
    *,
    shard_url: str | None,
    allowed_levels: int,
) -> ShardResult:
    """Reads each file of a shard once.

    Args:
        commits: of this shard, at least one.
        shard_url: where the images are; None if that is unknown.
        allowed_levels: allowed difference of the block means of canaries, in uint8 levels.
    """
    check = _ShardCheck(cache_url, records, [commit.decompress() for commit in commits])
    index = check.read_index()
    plan = records.plan
    replayed = None
    if records.header is not None and plan is not None and index is not None:
        replayed = ReplayedShard.of(plan, records.header.input_size, index)
    with ThreadPoolExecutor(1, thread_name_prefix="decode") as decoders:
        images = check.open_images(index, shard_url, decoders)
        for commit in check.commits:
            content = check.check_part(commit, index, replayed)
            check.check_sums(commit, index, content)
            if content is not None and commit.part.path in records.manifest_parts:
                check.result.moment_sums_3 += content.moment_sums_3
            if content is None or not content.canaries:
                continue
            if images is None:
                check.findings.not_checked[SHARD_MISSING] += len(content.canaries)
            else:
                check_canaries(images, commit, content.canaries, check.findings, allowed_levels=allowed_levels)
    return check.result


class _ShardCheck:
    def __init__(self, cache_url: str, records: CacheRecords, commits: list[Commit]) -> None:
        self.commits, self.result = commits, ShardResult()
        self.findings = self.result.findings
        self._cache_url, self._records, self._shard_id = cache_url, records, commits[0].shard_id

    def read_index(self) -> ShardIndex | None:
        """The index, if it contradicts neither itself nor the commits. Rows are compared with no other index."""
        commit, header = self.commits[0], self._records.header

        def check(findings: Findings) -> ShardIndex:
            data = read_committed(self._cache_url, commit.index)
            index = decode_index(data, where=commit.index.path, settings=None if header is None else header.data)
            _check_index(index, commit, findings)
            return index

        return self._checked_index(commit.index.path, check)

    def _read_relabelled(self, built: ShardIndex) -> ShardIndex | None:
        """The index with new labels, if it has one and everything else equals the index of the build."""
        relabelled = self._records.relabelled(self._shard_id)
        if relabelled is None:
            return None
        path = layout.relabelled_path(self._shard_id, relabelled.index_sha256)

        def check(findings: Findings) -> ShardIndex:
            data = read_file(self._cache_url, path)
            what = "this file was changed after it was written"
            findings.expect(path, what, digest(data), relabelled.index_sha256, shard=self._shard_id)
            index = decode_index(data, where=path)
            for name in _NOT_RELABELLED:
                got, expected = getattr(index, name), getattr(built, name)
                same = np.array_equal(got, expected) if isinstance(got, np.ndarray) else got == expected
                findings.expect(path, f"whether {name} equals that of the build", same, True, shard=self._shard_id)
            return index

        return self._checked_index(path, check)

    def _checked_index(self, path: str, check: Callable[[Findings], ShardIndex]) -> ShardIndex | None:
        """The index that ``check`` returns, if it adds no problem and all targets are in range."""
        findings, index, header = Findings(), None, self._records.header
        with findings.capture(path, "indexes", shard=self._shard_id):
            index = check(findings)
            if header is not None:
                num_invalid = task_of(header.data).num_invalid(index.targets)
                findings.expect(path, "targets out of range", num_invalid, 0, shard=self._shard_id)
        self.findings.merge(findings)
        return None if findings.num_problems else index

    def check_part(
        self, commit: Commit, index: ShardIndex | None, replayed: ReplayedShard | None
    ) -> PartContent | None:
        """The content of a part; None if its bytes are not those that were committed."""
        header = self._records.header
        with self.findings.capture(commit.part.path, "parts", shard=self._shard_id), temporary_folder() as scratch:
            path = _fetch(self._cache_url, commit.part, Path(scratch))
            check_digest(commit.part, path.stat().st_size, file_digest(path))
            self.findings.checked["bytes"] += commit.part.size_bytes
            if header is None or index is None:
                self.findings.not_checked[_NO_HEADER if header is None else _NO_INDEX] += 1
                return None
            if replayed is None:
                self.findings.not_checked[_NO_PLAN] += 1
            return PartCheck(commit, header, index, replayed, self._records.moments, self.findings).run(path)
        return None

    def check_sums(self, commit: Commit, index: ShardIndex | None, content: PartContent | None) -> None:
        if commit.means is None:
            return
        in_manifest, path = commit.part.path in self._records.manifest_parts, commit.means.path
        sums = self._read_sums(commit.means)
        if sums is None:
            self.result.lost_sums |= in_manifest
            return
        if index is not None:
            classes, counts = np.unique(index.task.class_ids(index.ok_targets)[1], return_counts=True)
            expected = dict(zip(classes.tolist(), counts.tolist(), strict=True))
            got = dict(zip(sums.class_C.tolist(), sums.count_C.tolist(), strict=True))
            what = "rows by class do not match the index"
            self.findings.expect(path, what, got, expected, shard=self._shard_id)
        if content is not None and content.sums is not None:
            same = all(
                np.array_equal(getattr(sums, name), getattr(content.sums, name))
                for name in ("class_C", "count_C", "sum_CD")
            )
            what = "whether the sums equal those of the part's embeddings"
            self.findings.expect(path, what, same, True, shard=self._shard_id)
        if in_manifest:
            self.result.sums = sums if self.result.sums is None else merge([self.result.sums, sums])

    def _read_sums(self, ref: FileRef) -> ClassSums | None:
        with self.findings.capture(ref.path, "class sums", shard=self._shard_id):
            data = read_committed(self._cache_url, ref)
            try:
                return decode_sums(data, where=ref.path)
            # The Parquet file has other columns or metadata.
            except (KeyError, TypeError, ValueError) as error:
                got = f"{type(error).__name__}: {error}"
                raise CacheError(
                    "this is not a file of class sums", code="cache.invalid-class-sums", got=got
                ) from error
        return None

    def open_images(
        self, index: ShardIndex | None, url: str | None, decoders: ThreadPoolExecutor
    ) -> ShardImages | None:
        """The images, if the shard is available and has the expected size."""
        records = self._records
        if records.header is None or index is None:
            return None
        relabelled = self._read_relabelled(index)
        if url is None or records.plan is None:
            return None
        try:
            size_bytes = storage.size(url)
        except StillroomError as error:
            self.findings.not_checked[f"canaries of a shard: {error.what}"] += 1
            return None
        named = records.relabelled(self._shard_id)
        expected = self.commits[0].shard_size_bytes if named is None else named.size_bytes
        what = "the size of this shard has changed since its parts were built"
        if not self.findings.expect(redact(url), what, size_bytes, expected, shard=self._shard_id):
            return None
        return ShardImages(url, relabelled or index, records.header, records.plan, decoders)


def _fetch(cache_url: str, ref: FileRef, scratch: Path) -> Path:
    url = storage.join(cache_url, ref.path)
    try:
        return storage.local_copy(url, scratch)
    except StorageInputError as error:
        raise missing_file(url, error) from error


def _check_index(index: ShardIndex, commit: Commit, findings: Findings) -> None:
    """Compares an index with a commit of its shard, and its rows with each other."""
    path, shard = commit.index.path, commit.shard_id

    def expect(what: str, got: object, expected: object) -> None:
        findings.expect(path, what, got, expected, shard=shard)

    findings.checked["samples"] += len(index)
    statuses = Counter(STATUSES[code] for code in index.status.tolist())
    skipped = {status: count for status, count in statuses.items() if status != "ok"}
    expect("this index is of another shard", index.shard_id, shard)
    expect("samples read", len(index), commit.read)
    expect("samples that can be used", index.num_ok, commit.num_ok)
    expect("samples skipped", dict(sorted(skipped.items())), commit.skipped)
    keys = index.keys.take(index.ok).to_pylist()
    expect("duplicate keys", [key for key, count in Counter(keys).items() if count > 1], [])
    sides = np.stack([index.width[index.ok], index.height[index.ok]])
    expect("images without a size", int((sides < 1).any(0).sum()), 0)
    ends = index.offset.astype(np.int64) + index.size
    inside = (index.offset >= 0) & (index.size >= 0) & (ends <= commit.shard_size_bytes)
    expect("byte ranges outside of the shard", int((~inside).sum()), 0)
