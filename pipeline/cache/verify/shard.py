"""One shard of a cache: its index, then every part that stands on it."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline import storage
from pipeline.cache.build.class_means import ClassSums, decode_sums, merge
from pipeline.cache.format.files import missing_file, read_file
from pipeline.cache.verify.draws import ShardAugParams
from pipeline.cache.verify.images import ShardImages, check_canaries
from pipeline.cache.verify.part import Canary, PartCheck, PartContent, check_file
from pipeline.cache.verify.records import CompressedCommit, StructuredRows, check_bytes
from pipeline.cache.verify.report import Findings
from pipeline.core.errors import CacheError, StillroomError, StorageInputError
from pipeline.core.hashing import digest
from pipeline.core.redaction import redact
from pipeline.core.temporary import temporary_folder
from pipeline.shards.index import NO_LABEL, STATUSES, ShardIndex, decode_index
from schemas.cache_format import Commit, FileRef

_NO_INDEX = "rows of parts: their index cannot be trusted"
SHARD_MISSING = "canaries: their shard is not here"
_NO_HEADER = "rows of parts: the header cannot be read"
_NO_PLAN = "drawn parameters and canaries: the plan is of another version"


@dataclass(frozen=True, slots=True)
class ShardTask:
    """The commits of one shard, and where its images are; None: nowhere that is known."""

    cache_url: str
    records: StructuredRows
    commits: list[CompressedCommit]
    shard_url: str | None
    allowed_levels: int = 0
    """By which block means of canaries may differ."""


@dataclass(slots=True)
class ShardResult:
    """``sums`` are those of the commits that the manifest names, as far as they are there and whole."""

    findings: Findings = field(default_factory=Findings)
    sums: ClassSums | None = None
    lost_sums: bool = False


def check_shard(task: ShardTask) -> ShardResult:
    """Reads every file of a shard once."""
    with ThreadPoolExecutor(1, thread_name_prefix="decode") as decoders:
        return _ShardCheck(task, decoders).run()


class _ShardCheck:
    def __init__(self, task: ShardTask, decoders: ThreadPoolExecutor) -> None:
        self._task, self._decoders = task, decoders
        self._commits = [kept.unpack() for kept in task.commits]
        self._shard_id = self._commits[0].shard_id
        self._result = ShardResult()
        self._findings = self._result.findings
        self._index = self._read_index()
        self._relabelled = self._read_relabelled()
        plan = task.records.plan
        self._draws = None if plan is None or self._index is None else ShardAugParams.of(plan, self._index)
        self._images = self._open_images()

    def run(self) -> ShardResult:
        for commit in self._commits:
            content = self._check_part(commit)
            self._check_sums(commit, content)
            if content is not None and content.canaries:
                self._check_canaries(commit, content.canaries)
        return self._result

    def _read_index(self) -> ShardIndex | None:
        """The index, if it contradicts neither itself nor the commits: rows are held to nothing less."""
        commit, header = self._commits[0], self._task.records.header
        path, own = commit.index.path, Findings()
        index = None
        with own.told(path, shard=self._shard_id):
            own.checked["indexes"] += 1
            data = read_file(self._task.cache_url, path)
            check_bytes(data, commit.index)
            index = decode_index(data, where=path, settings=None if header is None else header.data)
            _check_index(path, index, commit, own)
            if header is not None:
                beyond = int(((index.label < NO_LABEL) | (index.label >= header.num_classes)).sum())
                own.expect(path, "labels outside of the classes", beyond, 0, shard=self._shard_id)
        self._findings.merge(own)
        return None if own.num_problems else index

    def _read_relabelled(self) -> ShardIndex | None:
        """The index whose labels were read again, if it is that of the build but for labels and places in the tar."""
        named, header = self._task.records.relabelled.get(self._shard_id), self._task.records.header
        if named is None or header is None or self._index is None:
            return None
        path, own = named.path(self._shard_id), Findings()
        index = None
        with own.told(path, shard=self._shard_id):
            own.checked["indexes"] += 1
            data = read_file(self._task.cache_url, path)
            own.expect(path, "this file is not the one that was published", digest(data), named.sha256)
            index = decode_index(data, where=path)
            for name in ("shard_id", "keys", "status", "size", "width", "height", "content_hash"):
                got, expected = getattr(index, name), getattr(self._index, name)
                same = np.array_equal(got, expected) if isinstance(got, np.ndarray) else got == expected
                own.expect(path, f"{name} of another index than the build's", same, True, shard=self._shard_id)
            beyond = int(((index.label < NO_LABEL) | (index.label >= header.num_classes)).sum())
            own.expect(path, "labels outside of the classes", beyond, 0, shard=self._shard_id)
        self._findings.merge(own)
        return None if own.num_problems else index

    def _check_part(self, commit: Commit) -> PartContent | None:
        """The content of a part whose bytes are those committed."""
        header = self._task.records.header
        with (
            self._findings.told(commit.part.path, shard=self._shard_id),
            temporary_folder() as scratch,
        ):
            self._findings.checked["parts"] += 1
            path = _fetch(self._task.cache_url, commit.part, Path(scratch))
            check_file(path, commit.part)
            self._findings.checked["bytes"] += commit.part.size_bytes
            if header is None or self._index is None:
                self._findings.not_checked[_NO_HEADER if header is None else _NO_INDEX] += 1
                return None
            if self._draws is None:
                self._findings.not_checked[_NO_PLAN] += 1
            return PartCheck(commit, header, self._index, self._draws, self._findings).run(path)
        return None

    def _check_sums(self, commit: Commit, content: PartContent | None) -> None:
        if commit.means is None:
            return
        sums = self._read_sums(commit.means)
        in_manifest = commit.part.path in self._task.records.in_manifest
        self._result.lost_sums |= sums is None and in_manifest
        if sums is None:
            return
        path, known = commit.means.path, self._result.sums
        if self._index is not None:
            _check_counts(path, sums, self._index, self._findings)
        if content is not None and content.sums is not None:
            same = _equal(sums, content.sums)
            self._findings.expect(path, "the sums of the part's embeddings", same, True, shard=self._shard_id)
        if in_manifest:
            self._result.sums = sums if known is None else merge([known, sums])

    def _read_sums(self, ref: FileRef) -> ClassSums | None:
        with self._findings.told(ref.path, shard=self._shard_id):
            self._findings.checked["class sums"] += 1
            data = read_file(self._task.cache_url, ref.path)
            check_bytes(data, ref)
            try:
                return decode_sums(data, where=ref.path)
            # Parquet of other columns or other metadata.
            except (KeyError, TypeError, ValueError) as error:
                raise CacheError("these are no class sums", got=f"{type(error).__name__}: {error}") from error
        return None

    def _open_images(self) -> ShardImages | None:
        """The shard, if it can be reached."""
        url, records, commit = self._task.shard_url, self._task.records, self._commits[0]
        if url is None or records.header is None or self._index is None or records.plan is None:
            return None
        images = ShardImages(url, self._relabelled or self._index, records.header, records.plan, self._decoders)
        try:
            size_bytes = storage.size(url)
        except StillroomError as error:
            self._findings.not_checked[f"canaries of a shard: {error.what}"] += 1
            return None
        where = redact(url)
        what = "this shard is not as long as when its parts were built"
        named = records.relabelled.get(self._shard_id)
        expected = commit.shard_size_bytes if named is None else named.size_bytes
        same = self._findings.expect(where, what, size_bytes, expected, shard=self._shard_id)
        return images if same else None

    def _check_canaries(self, commit: Commit, canaries: list[Canary]) -> None:
        if self._images is None:
            self._findings.not_checked[SHARD_MISSING] += len(canaries)
            return
        check_canaries(self._images, commit, canaries, self._findings, allowed_levels=self._task.allowed_levels)


def _fetch(cache_url: str, ref: FileRef, scratch: Path) -> Path:
    url = storage.join(cache_url, ref.path)
    try:
        return storage.local_copy(url, scratch)
    except StorageInputError as error:
        raise missing_file(url, error) from error


def _check_index(path: str, index: ShardIndex, commit: Commit, findings: Findings) -> None:
    """An index against the commits that stand on it, and against itself."""
    shard = commit.shard_id
    findings.checked["samples"] += len(index)
    findings.expect(path, "this index is of another shard", index.shard_id, shard)
    statuses = Counter(STATUSES[code] for code in index.status.tolist())
    skipped = {status: count for status, count in statuses.items() if status != "ok"}
    findings.expect(path, "samples read", len(index), commit.read, shard=shard)
    findings.expect(path, "samples that can be used", index.num_ok, commit.num_ok, shard=shard)
    findings.expect(path, "samples skipped", dict(sorted(skipped.items())), commit.skipped, shard=shard)
    keys = index.keys.take(index.ok).to_pylist()
    repeated = [key for key, count in Counter(keys).items() if count > 1]
    findings.expect(path, "keys that stand there twice", repeated, [], shard=shard)
    sides = np.stack([index.width[index.ok], index.height[index.ok]])
    findings.expect(path, "images without a size", int((sides < 1).any(0).sum()), 0, shard=shard)
    ends = index.offset.astype(np.int64) + index.size
    inside = (index.offset >= 0) & (index.size >= 0) & (ends <= commit.shard_size_bytes)
    findings.expect(path, "byte ranges outside of the shard", int((~inside).sum()), 0, shard=shard)


def _check_counts(path: str, sums: ClassSums, index: ShardIndex, findings: Findings) -> None:
    label_N = index.label[index.ok]
    classes, counts = np.unique(label_N[label_N != NO_LABEL], return_counts=True)
    expected = dict(zip(classes.tolist(), counts.tolist(), strict=True))
    got = dict(zip(sums.class_C.tolist(), sums.count_C.tolist(), strict=True))
    findings.expect(path, "rows by class are not those of the index", got, expected, shard=index.shard_id)


def _equal(one: ClassSums, other: ClassSums) -> bool:
    pairs = ((one.class_C, other.class_C), (one.count_C, other.count_C), (one.sum_CD, other.sum_CD))
    return all(np.array_equal(first, second) for first, second in pairs)
