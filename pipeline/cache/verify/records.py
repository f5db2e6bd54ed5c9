"""Header, commits, manifest and its tables: each record by its digest, and all of them against each other."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.augment.params import EVAL_VIEW
from pipeline.cache.build.blocks import holds_class_sums
from pipeline.cache.build.commit import READ_THREADS, CommitSummary
from pipeline.cache.build.fold import fold_commits
from pipeline.cache.build.imported_means import imported_sha256
from pipeline.cache.build.manifest import locate, parse_manifest
from pipeline.cache.format import layout
from pipeline.cache.format.files import changed_file, parse_record, read_file, read_parquet
from pipeline.cache.format.head_file import head_sha256, read_head
from pipeline.cache.format.header import parse_header, replayable_plan
from pipeline.cache.read.reader import ShardEntry
from pipeline.cache.verify.moments import MomentsCheck, read_moments
from pipeline.cache.verify.report import Findings, Problem
from pipeline.core.errors import CacheError, ShardError
from pipeline.core.hashing import digest, short_digest
from pipeline.core.redaction import redact
from pipeline.core.threads import map_ordered
from pipeline.shards.shard_urls import shard_id
from pipeline.tasks import Task, task_of
from schemas.cache_format import Commit, FileRef, Header, Manifest
from schemas.config import ViewsConfig

_MAGIC_BYTES = len(b"PAR1")
_INCOMPLETE = "totals of the manifest: a commit is damaged or missing"


@dataclass(frozen=True, slots=True)
class CompressedCommit:
    """A commit as its compressed file, a tenth of the size of its objects: a cache may have millions of commits."""

    summary: CommitSummary
    data: bytes = field(repr=False)

    @classmethod
    def of(cls, commit: Commit, data: bytes) -> CompressedCommit:
        return cls(CommitSummary.of(commit), zlib.compress(data))

    def decompress(self) -> Commit:
        return parse_record(Commit, zlib.decompress(self.data), where=self.path)

    @property
    def path(self) -> str:
        return layout.commit_path(self.summary.shard_id, self.summary.block)


@dataclass(frozen=True, slots=True)
class CacheRecords:
    """The records without a problem.

    Attributes:
        commits: in the order of their paths.
        damaged: paths of the other commits.
        manifest_parts: paths of the parts that the manifest names.
        shards: those of the manifest, by id.
        moments_tables: paths of the tables that records of moments name.
        moments: of the manifest; None: they were not computed, or have a problem.
    """

    header: Header | None
    manifest: Manifest | None
    commits: list[CompressedCommit]
    damaged: set[str]
    manifest_parts: set[str] = field(default_factory=set[str])
    shards: dict[str, ShardEntry] = field(default_factory=dict[str, ShardEntry])
    moments_tables: set[str] = field(default_factory=set[str])
    moments: MomentsCheck | None = None

    @property
    def complete(self) -> bool:
        """Whether the manifest's parts are known, and each has a commit without a problem."""
        return bool(self.manifest_parts) and self.manifest_parts <= {commit.summary.part for commit in self.commits}

    def shard_url(self, shard_id: str) -> str | None:
        """Where the build read a shard; None for a shard that the manifest does not name."""
        shard = self.shards.get(shard_id)
        return None if shard is None or self.manifest is None else locate(self.manifest.base, shard.path)

    def relabelled(self, shard_id: str) -> ShardEntry | None:
        """The shard, if its labels were read again after the build."""
        return self.shards.get(shard_id) if self.manifest is not None and self.manifest.labels is not None else None

    @property
    def task(self) -> Task:
        return task_of({} if self.header is None else self.header.data)

    @property
    def plan(self) -> ViewsConfig | None:
        """The plan of views; None if this version cannot replay it."""
        try:
            return None if self.header is None else replayable_plan(self.header)
        except CacheError:
            return None

    def unnamed(self, entries: Iterable[storage.Entry]) -> list[str]:
        """Temporary files, and files that no record names. Files that only a damaged commit may name are left out."""
        named = {layout.HEADER, layout.MANIFEST, layout.SHARDS, layout.PARTS, layout.CLASS_MEANS}
        named |= self.manifest_parts | self.moments_tables
        for commit in self.commits:
            named |= {commit.summary.part, commit.summary.index, *filter(None, [commit.summary.means])}
        if self.header is not None and imported_sha256(self.header) is not None:
            named.add(layout.IMPORTED_MEANS)
        if self.header is not None and head_sha256(self.header) is not None:
            named.add(layout.HEAD)
        return [entry.path for entry in entries if entry.is_temporary or not self._is_named(entry.path, named)]

    def _is_named(self, path: str, named: set[str]) -> bool:
        # A pinned manifest may name any former table, and any index with earlier labels.
        is_record = layout.is_commit(path) or layout.is_moments_record(path)
        if path in named or is_record or path.startswith((layout.FORMER, layout.RELABELLED)):
            return True
        owner = layout.owner(path)
        if owner is not None:
            return layout.commit_path(*owner) in self.damaged
        in_damaged = any(path == layout.index_path(commit.split("/")[1]) for commit in self.damaged)
        return in_damaged or path.startswith(f"{layout.LOG}/")


def read_records(cache_url: str, entries: Sequence[storage.Entry], findings: Findings) -> CacheRecords:
    """Reads and compares all records and tables. A record with a problem is left out of the result."""
    header = _read_header(cache_url, findings)
    if header is not None and head_sha256(header) is not None:
        with findings.capture(layout.HEAD, "heads"):
            read_head(cache_url, header)
    commits, damaged = _read_commits(cache_url, entries, header, findings)
    manifest, manifest_sha256 = _read_manifest(cache_url, header, findings)
    tables, moments = read_moments(cache_url, entries, header, manifest, manifest_sha256, findings)
    records = CacheRecords(header, manifest, commits, damaged, moments_tables=tables, moments=moments)
    if records.manifest is not None:
        _check_tables(cache_url, records.manifest, records, findings)
    for entry in entries:
        if entry.path.startswith(layout.FORMER) and not entry.is_temporary:
            with findings.capture(entry.path, "former tables"):
                got, expected = digest(read_file(cache_url, entry.path)), PurePosixPath(entry.path).stem
                findings.expect(entry.path, "the digest is not the one in the file name", got, expected)
    return records


def read_committed(cache_url: str, ref: FileRef) -> bytes:
    """
    Raises:
        CacheError: the file is missing, or its bytes are not those that a record names.
    """
    data = read_file(cache_url, ref.path)
    check_digest(ref, len(data), digest(data))
    return data


def check_digest(ref: FileRef, size_bytes: int, sha256: str) -> None:
    """
    Raises:
        CacheError: a file with this size and digest is not the one that a record names.
    """
    if (size_bytes, sha256) != (ref.size_bytes, ref.sha256):
        got = f"{size_bytes} bytes, sha256 {sha256[:16]}"
        raise changed_file(None, got=got, expected=f"{ref.size_bytes} bytes, sha256 {ref.sha256[:16]}")


def _read_record(cache_url: str, path: str) -> bytes:
    return read_file(cache_url, path, max_bytes=storage.MAX_RECORD_BYTES)


def _read_header(cache_url: str, findings: Findings) -> Header | None:
    path = layout.HEADER
    with findings.capture(path, "records"):
        header = parse_header(_read_record(cache_url, path), where=path)
        findings.expect(path, "views_id is not the hash of the views", header.views_id, short_digest(header.views))
        findings.expect(
            path, "fingerprint is not the hash of the teacher", header.fingerprint, short_digest(header.teacher)
        )
        views_id = header.teacher.get("views_id")
        findings.expect(path, "the teacher's outputs are of other views", views_id, header.views_id)
        return header
    return None


def _read_manifest(cache_url: str, header: Header | None, findings: Findings) -> tuple[Manifest | None, str]:
    """The manifest, and the SHA-256 of its bytes."""
    path = layout.MANIFEST
    with findings.capture(path, "records"):
        if not storage.exists(storage.join(cache_url, path)):
            raise CacheError(
                "there is no manifest: the build did not finish, or the file was removed",
                code="cache.unfinished",
                next_step="run: stillroom cache build CONFIG (it resumes)",
            )
        data = _read_record(cache_url, path)
        manifest = parse_manifest(data, where=path)
        if header is not None:
            header_sha256 = digest(_read_record(cache_url, layout.HEADER))
            findings.expect(path, "this manifest belongs to another header", header_sha256, manifest.header_sha256)
        return manifest, digest(data)
    return None, ""


def _read_commits(
    cache_url: str, entries: Sequence[storage.Entry], header: Header | None, findings: Findings
) -> tuple[list[CompressedCommit], set[str]]:
    """The commits without a problem, by path, and the paths of the others."""
    paths = [entry.path for entry in entries if layout.is_commit(entry.path)]

    def read(path: str) -> tuple[Commit | None, bytes, Findings]:
        commit, data, commit_findings = None, b"", Findings()
        with commit_findings.capture(path, "records"):
            data = storage.read(storage.join(cache_url, path), max_bytes=storage.MAX_RECORD_BYTES)
            commit = parse_record(Commit, data, where=redact(storage.join(cache_url, path)))
            _check_commit(path, commit, header, commit_findings)
        return commit if not commit_findings.num_problems else None, data, commit_findings

    first_of_shard: dict[str, tuple[FileRef, dict[str, Any]]] = {}
    covered: set[tuple[str, int]] = set()
    commits: list[CompressedCommit] = []
    damaged: set[str] = set()
    results = map_ordered(read, paths, threads=READ_THREADS, ahead=4 * READ_THREADS, name="verify")
    for path, (commit, data, commit_findings) in zip(paths, results, strict=True):
        if commit is not None:
            shard = commit.shard_id
            samples = commit.model_dump(include={"shard_size_bytes", "num_ok", "read", "written", "skipped"})
            first_index, first_samples = first_of_shard.setdefault(shard, (commit.index, samples))
            expect = commit_findings.expect
            expect(path, "an index that differs from that of the shard's first commit", commit.index, first_index)
            expect(path, "the shard changed between two of its parts", samples, first_samples)
            views = {(shard, view.view) for view in commit.views}
            expect(path, "another commit covers these views", sorted(views & covered), [])
            covered |= views
        findings.merge(commit_findings)
        if commit is None or commit_findings.num_problems:
            damaged.add(path)
        else:
            commits.append(CompressedCommit.of(commit, data))
    return commits, damaged


def _check_commit(path: str, commit: Commit, header: Header | None, findings: Findings) -> None:
    """Compares a commit with its path and the header, and its fields with each other."""
    shard, block, expect = commit.shard_id, commit.block, findings.expect
    expect(path, "this commit is of another block", layout.commit_path(shard, block), path)
    part_path = layout.part_path(shard, block).replace("{sha16}", commit.part.sha256[:16])
    expect(path, "the path of the part does not match the commit", commit.part.path, part_path)
    index_path = layout.index_path(shard)
    expect(path, "the path of the index does not match the commit", commit.index.path, index_path)
    if commit.means is not None:
        means_path = layout.means_path(shard, block).replace("{sha16}", commit.means.sha256[:16])
        expect(path, "the path of the class sums does not match the commit", commit.means.path, means_path)
    rows = dict.fromkeys([EVAL_VIEW] if block.is_eval else block.views, commit.num_ok)
    expect(path, "rows by view", {view.view: view.rows for view in commit.views}, rows)
    expect(path, "samples written", commit.written, commit.num_ok)
    starts = [*(view.offset for view in commit.views), commit.footer.offset, commit.part.size_bytes]
    ends = [_MAGIC_BYTES, *(item.offset + item.size_bytes for item in (*commit.views, commit.footer))]
    expect(path, "the byte ranges are not contiguous", starts, ends)
    if header is not None:
        expect(path, "this commit belongs to another teacher", commit.fingerprint, header.fingerprint)
        has_sums = commit.num_ok > 0 and holds_class_sums(header.teacher.get("class_means"), block)
        expect(path, "whether this commit names class sums", commit.means is not None, has_sums)


def _check_tables(cache_url: str, manifest: Manifest, records: CacheRecords, findings: Findings) -> None:
    shards = _read_table(cache_url, manifest.shards, layout.SHARDS, findings)
    parts = _read_table(cache_url, manifest.parts, layout.PARTS, findings)
    if shards is None or parts is None:
        return
    empty, what = fold_commits([], [], records.task), "this table has other columns"
    same = findings.expect(layout.PARTS, what, parts.schema.names, empty.parts.schema.names)
    names = ["shard_id", "path", *empty.shards.schema.names[1:]]
    if not (findings.expect(layout.SHARDS, what, shards.schema.names, names) and same):
        return
    records.manifest_parts.update(map(str, parts["path"].to_pylist()))
    for shard in ShardEntry.from_table(shards):
        what = "the path of another shard"
        findings.expect(layout.SHARDS, what, _shard_of(str(shard.path)), shard.shard_id, shard=shard.shard_id)
        records.shards[shard.shard_id] = shard
    _check_fold(manifest, shards, parts, records, findings)


def _shard_of(path: str) -> str:
    try:
        return shard_id(path)
    except ShardError as error:
        return error.what


def _read_table(cache_url: str, ref: FileRef, path: str, findings: Findings) -> pa.Table | None:
    if not findings.expect(layout.MANIFEST, "this manifest names another file", ref.path, path):
        ref = ref.model_copy(update={"path": path})
    with findings.capture(path, "records"):
        return read_parquet(read_committed(cache_url, ref))
    return None


def _check_fold(
    manifest: Manifest, shards: pa.Table, parts: pa.Table, records: CacheRecords, findings: Findings
) -> None:
    """The manifest must be the fold of the commits of its parts. Other commits belong to a running build."""
    shard_ids: list[str] = shards["shard_id"].to_pylist()
    commits = [commit for commit in records.commits if commit.summary.part in records.manifest_parts]
    if num_newer := len(records.commits) - len(commits):
        findings.checked["commits that are not in the manifest yet"] += num_newer
    other_shards = {*parts["shard_id"].to_pylist()} - {*shard_ids}
    findings.expect(layout.PARTS, "parts of other shards", sorted(map(str, other_shards)), [])
    paths = {commit.summary.part for commit in commits}
    for path in sorted(records.manifest_parts - paths):
        _report_missing_commit(path, records, findings)
    fold = fold_commits((commit.decompress() for commit in commits), shard_ids, records.task)
    if records.complete:
        for key, expected in fold.totals.items():
            got = getattr(manifest, key)
            if key == "statistics" and manifest.labels is not None:
                excluded = {*records.task.statistics_fields}
                got, expected = (value.model_dump(exclude=excluded) for value in (got, expected))
            findings.expect(layout.MANIFEST, f"{key} is not the sum of the commits", got, expected)
    else:
        findings.not_checked[_INCOMPLETE] += 1
        shards = _rows_with(shards, "shard_id", {*fold.shards["shard_id"].to_pylist()})
        parts = _rows_with(parts, "path", paths)
    # A shard whose labels were read again has another index, and may have been packed again.
    relabelled = ["index_sha256", "size_bytes"] if manifest.labels is not None else []
    got_shards = shards.drop_columns(["path", *relabelled])
    _compare_tables(layout.SHARDS, got_shards, fold.shards.drop_columns(relabelled), findings)
    _compare_tables(layout.PARTS, parts, fold.parts, findings)


def _rows_with(table: pa.Table, name: str, values: set[str]) -> pa.Table:
    return table.filter(pa.array([value in values for value in table[name].to_pylist()], pa.bool_()))


def _report_missing_commit(part_path: str, records: CacheRecords, findings: Findings) -> None:
    owner = layout.owner(part_path)
    if owner is None:
        findings.add(Problem(layout.PARTS, "this is not the path of a part", got=part_path))
    elif (path := layout.commit_path(*owner)) not in records.damaged:
        what = "the manifest names a part of this block, and no commit does"
        findings.add(Problem(path, what, got=part_path, shard=owner[0]))


def _compare_tables(path: str, got: pa.Table, expected: pa.Table, findings: Findings) -> None:
    """Adds a problem with the first cell that differs."""
    if got.equals(expected):
        return
    what = "this table is not the fold of the commits"
    if got.schema != expected.schema or len(got) != len(expected):
        findings.expect(path, what, (got.schema.names, len(got)), (expected.schema.names, len(expected)))
        return
    for name in expected.schema.names:
        cells = zip(got[name].to_pylist(), expected[name].to_pylist(), expected["shard_id"].to_pylist(), strict=True)
        for got_cell, expected_cell, shard in cells:
            if not findings.expect(path, f"{what}: {name}", got_cell, expected_cell, shard=str(shard)):
                return
