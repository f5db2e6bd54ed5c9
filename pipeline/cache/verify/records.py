"""Header, commits and manifest: each record by its seal, all of them by each other."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import pyarrow as pa

from pipeline import storage
from pipeline.augment.params import EVAL_VIEW
from pipeline.cache.build.blocks import holds_class_sums
from pipeline.cache.build.commit import READ_THREADS, CommitSummary
from pipeline.cache.build.fold import fold_commits
from pipeline.cache.build.imported_means import imported_sha256
from pipeline.cache.build.manifest import locate, parse_manifest
from pipeline.cache.format import layout
from pipeline.cache.format.files import REBUILD, parse_record, read_file, read_parquet
from pipeline.cache.format.header import parse_header, replayable_plan
from pipeline.cache.verify.report import Findings, Problem
from pipeline.core.errors import CacheError, ShardError
from pipeline.core.hashing import digest, short
from pipeline.core.redaction import redact
from pipeline.core.threads import map_ordered
from pipeline.shards.shard_urls import shard_id
from schemas.cache_format import Commit, FileRef, Header, Manifest
from schemas.config import ViewsConfig

_MAGIC_BYTES = len(b"PAR1")
_BY_LABELS = {"labelled": 0, "top1_hits": 0, "top5_hits": 0, "class_counts": {}}
_DAMAGED = "totals of the manifest: a commit is damaged or missing"


@dataclass(frozen=True, slots=True)
class CompressedCommit:
    """A commit as its compressed file, which takes a tenth of its objects: a cache may have millions."""

    standing: CommitSummary
    packed: bytes = field(repr=False)

    @classmethod
    def of(cls, commit: Commit, data: bytes) -> CompressedCommit:
        return cls(CommitSummary.of(commit), zlib.compress(data))

    def unpack(self) -> Commit:
        return parse_record(Commit, zlib.decompress(self.packed), where=self.path)

    @property
    def path(self) -> str:
        return layout.commit_path(self.standing.shard_id, self.standing.block)


@dataclass(frozen=True, slots=True)
class Relabelled:
    """The index that a manifest names instead of the build's, and the bytes of the shard that it is of."""

    sha256: str
    size_bytes: int

    def path(self, shard_id: str) -> str:
        return layout.relabelled_path(shard_id, self.sha256)


@dataclass(frozen=True, slots=True)
class StructuredRows:
    """What the records say, as far as they can be trusted. ``commits`` are in order of their paths."""

    header: Header | None
    manifest: Manifest | None
    commits: list[CompressedCommit]
    broken: set[str]
    """Paths of commits that say nothing."""
    in_manifest: set[str] = field(default_factory=set[str])
    """Paths of the parts that the manifest names."""
    shard_urls: dict[str, str] = field(default_factory=dict[str, str])
    """Where the build found each shard of the manifest."""
    relabelled: dict[str, Relabelled] = field(default_factory=dict[str, "Relabelled"])
    """Of shards whose labels were read again after the build."""

    @property
    def complete(self) -> bool:
        """Whether the manifest's parts are known, and the commit of each."""
        return bool(self.in_manifest) and self.in_manifest <= {commit.standing.part for commit in self.commits}

    @property
    def plan(self) -> ViewsConfig | None:
        """The plan of views, if this version draws it as the builder did."""
        try:
            return None if self.header is None else replayable_plan(self.header)
        except CacheError:
            return None

    def unnamed(self, entries: Iterable[storage.Entry]) -> list[str]:
        """Files that no record names, as far as the records can be read."""
        known = {layout.HEADER, layout.MANIFEST, layout.SHARDS, layout.PARTS, layout.CLASS_MEANS}
        for commit in self.commits:
            known |= {commit.standing.part, commit.standing.index, *filter(None, [commit.standing.means])}
        known |= self.in_manifest
        if self.header is not None and imported_sha256(self.header) is not None:
            known.add(layout.IMPORTED_MEANS)
        return [entry.path for entry in entries if entry.is_temporary or not self._is_named(entry.path, known)]

    def _is_named(self, path: str, known: set[str]) -> bool:
        if path in known or layout.is_commit(path) or path.startswith((layout.FORMER, f"{layout.LOG}/")):
            return True
        # Of earlier labels too, which pinned manifests name.
        if path.startswith(layout.RELABELLED):
            return True
        owner = layout.owner(path)
        if owner is not None:
            return layout.commit_path(*owner) in self.broken
        return any(path == layout.index_path(commit.split("/")[1]) for commit in self.broken)


def read_records(cache_url: str, entries: Sequence[storage.Entry], findings: Findings) -> StructuredRows:
    """Reads every record and table and compares them; what is wrong is told and left out."""
    header = _read_header(cache_url, findings)
    commits, broken = _read_commits(cache_url, entries, header, findings)
    manifest = _read_manifest(cache_url, header, findings)
    records = StructuredRows(header, manifest, commits, broken)
    if manifest is not None:
        _check_tables(cache_url, manifest, records, findings)
    for entry in entries:
        if entry.path.startswith(layout.FORMER) and not entry.is_temporary:
            _check_former(cache_url, entry.path, findings)
    return records


def check_bytes(data: bytes, ref: FileRef) -> None:
    """
    Raises:
        CacheError: these are not the bytes that a record names.
    """
    if (len(data), got := digest(data)) != (ref.size_bytes, ref.sha256):
        raise CacheError(
            "this file is not the one that was committed",
            got=f"{len(data)} bytes, sha256 {got[:16]}",
            expected=f"{ref.size_bytes} bytes, sha256 {ref.sha256[:16]}",
            next_step=REBUILD,
        )


def _read_header(cache_url: str, findings: Findings) -> Header | None:
    with findings.told(layout.HEADER):
        findings.checked["records"] += 1
        header = parse_header(
            read_file(cache_url, layout.HEADER, max_bytes=storage.MAX_RECORD_BYTES), where=layout.HEADER
        )
        findings.expect(layout.HEADER, "the views id is not that of the views", header.views_id, short(header.views))
        findings.expect(
            layout.HEADER, "the fingerprint is not that of the teacher", header.fingerprint, short(header.teacher)
        )
        findings.expect(
            layout.HEADER, "the teacher was asked about other views", header.teacher.get("views_id"), header.views_id
        )
        return header
    return None


def _read_manifest(cache_url: str, header: Header | None, findings: Findings) -> Manifest | None:
    with findings.told(layout.MANIFEST):
        findings.checked["records"] += 1
        if not storage.exists(storage.join(cache_url, layout.MANIFEST)):
            raise CacheError(
                "there is none: the build did not finish, or it was removed",
                expected="run: stillroom cache build CONFIG",
            )
        manifest = parse_manifest(
            read_file(cache_url, layout.MANIFEST, max_bytes=storage.MAX_RECORD_BYTES), where=layout.MANIFEST
        )
        if header is not None:
            same = (
                digest(read_file(cache_url, layout.HEADER, max_bytes=storage.MAX_RECORD_BYTES))
                == manifest.header_sha256
            )
            findings.expect(layout.MANIFEST, "it was made with another header", same, True)
        return manifest
    return None


def _read_commits(
    cache_url: str, entries: Sequence[storage.Entry], header: Header | None, findings: Findings
) -> tuple[list[CompressedCommit], set[str]]:
    """The commits that can be trusted, by path, and the paths of the others."""
    paths = [entry.path for entry in entries if layout.is_commit(entry.path)]

    def read(path: str) -> tuple[Commit | None, bytes, Findings]:
        own, data = Findings(), b""
        with own.told(path):
            own.checked["records"] += 1
            url = storage.join(cache_url, path)
            data = storage.read(url, max_bytes=storage.MAX_RECORD_BYTES)
            commit = parse_record(Commit, data, where=redact(url))
            _check_commit(path, commit, header, own)
            return (commit if not own.num_problems else None), data, own
        return None, data, own

    firsts: dict[str, _OfShard] = {}
    covered: set[tuple[str, int]] = set()
    commits: list[CompressedCommit] = []
    broken: set[str] = set()
    results = map_ordered(read, paths, threads=READ_THREADS, ahead=4 * READ_THREADS)
    for path, (commit, data, own) in zip(paths, results, strict=True):
        if commit is not None:
            _check_beside(path, commit, firsts.setdefault(commit.shard_id, _OfShard.of(commit)), covered, own)
        findings.merge(own)
        if commit is None or own.num_problems:
            broken.add(path)
        else:
            commits.append(CompressedCommit.of(commit, data))
    return commits, broken


def _check_commit(path: str, commit: Commit, header: Header | None, findings: Findings) -> None:
    """What a commit says of itself, against its name and the header."""
    shard, block, sha16 = commit.shard_id, commit.block, commit.part.sha256[:16]
    mismatch = "this commit names a {} that is not its own"
    findings.expect(path, "this commit is of another block", layout.commit_path(shard, block), path)
    part_path = layout.part_path(shard, block).replace("{sha16}", sha16)
    findings.expect(path, mismatch.format("part"), commit.part.path, part_path)
    findings.expect(path, mismatch.format("index"), commit.index.path, layout.index_path(shard))
    if commit.means is not None:
        means_path = layout.means_path(shard, block).replace("{sha16}", commit.means.sha256[:16])
        findings.expect(path, mismatch.format("file of class sums"), commit.means.path, means_path)
    views = [EVAL_VIEW] if block.is_eval else list(block.views)
    rows = dict.fromkeys(views, commit.num_ok)
    findings.expect(path, "rows by view", {view.view: view.rows for view in commit.views}, rows)
    findings.expect(path, "samples written", commit.written, commit.num_ok)
    starts = [*(view.offset for view in commit.views), commit.footer.offset, commit.part.size_bytes]
    findings.expect(path, "byte ranges that do not follow each other", starts, _ends(commit))
    if header is not None:
        findings.expect(path, "this commit is of another teacher", commit.fingerprint, header.fingerprint)
        wants_means = commit.num_ok > 0 and holds_class_sums(header.teacher.get("class_means"), commit.block)
        findings.expect(path, "this commit names class sums", commit.means is not None, wants_means)


def _ends(commit: Commit) -> list[int]:
    """Where the magic, each view and the footer end."""
    return [_MAGIC_BYTES, *(item.offset + item.size_bytes for item in (*commit.views, commit.footer))]


@dataclass(frozen=True, slots=True)
class _OfShard:
    """What is the same in every commit of a shard."""

    index: FileRef
    samples: dict[str, object]

    @classmethod
    def of(cls, commit: Commit) -> _OfShard:
        names = {"shard_size_bytes", "num_ok", "read", "written", "skipped"}
        return cls(commit.index, commit.model_dump(include=names))


def _check_beside(
    path: str, commit: Commit, first: _OfShard, covered: set[tuple[str, int]], findings: Findings
) -> None:
    """Against the commits of the same shard that come before it."""
    shard, own = commit.shard_id, _OfShard.of(commit)
    findings.expect(path, "this commit is of another index than the shard's first", own.index, first.index)
    findings.expect(path, "the shard changed between two of its parts", own.samples, first.samples)
    views = {(shard, view.view) for view in commit.views}
    findings.expect(path, "views that another commit covers", sorted(views & covered), [])
    covered |= views


def _check_former(cache_url: str, path: str, findings: Findings) -> None:
    with findings.told(path):
        findings.checked["former tables"] += 1
        expected = PurePosixPath(path).stem
        findings.expect(path, "this file is not the one of its name", digest(read_file(cache_url, path)), expected)


def _check_tables(cache_url: str, manifest: Manifest, records: StructuredRows, findings: Findings) -> None:
    shards = _read_table(cache_url, manifest.shards, layout.SHARDS, findings)
    parts = _read_table(cache_url, manifest.parts, layout.PARTS, findings)
    if shards is None or parts is None:
        return
    empty = fold_commits([], [])
    same = findings.expect(layout.PARTS, "this table has other columns", parts.schema.names, empty.parts.schema.names)
    names = ["shard_id", "path", *empty.shards.schema.names[1:]]
    if not (findings.expect(layout.SHARDS, "this table has other columns", shards.schema.names, names) and same):
        return
    records.in_manifest.update(map(str, parts["path"].to_pylist()))
    if manifest.labels is not None:
        columns = (shards[name].to_pylist() for name in ("shard_id", "index_sha256", "size_bytes"))
        records.relabelled.update(
            {shard: Relabelled(sha256, size_bytes) for shard, sha256, size_bytes in zip(*columns, strict=True)}
        )
    _check_fold(manifest, shards, parts, records, findings)
    for shard, path in zip(shards["shard_id"].to_pylist(), shards["path"].to_pylist(), strict=True):
        findings.expect(layout.SHARDS, "the path of another shard", _shard_of(str(path)), shard, shard=shard)
        records.shard_urls[shard] = locate(manifest.base, str(path))


def _shard_of(path: str) -> str:
    try:
        return shard_id(path)
    except ShardError as error:
        return error.what


def _read_table(cache_url: str, ref: FileRef, path: str, findings: Findings) -> pa.Table | None:
    findings.expect(layout.MANIFEST, "this manifest names another file", ref.path, path)
    with findings.told(path):
        findings.checked["records"] += 1
        data = read_file(cache_url, path)
        check_bytes(data, ref)
        return read_parquet(data)
    return None


def _check_fold(
    manifest: Manifest, shards: pa.Table, parts: pa.Table, records: StructuredRows, findings: Findings
) -> None:
    """The manifest is the fold of the commits of the parts that it names; others belong to a build that goes on."""
    shard_ids: list[str] = shards["shard_id"].to_pylist()
    inside = [commit for commit in records.commits if commit.standing.part in records.in_manifest]
    if beyond := len(records.commits) - len(inside):
        findings.checked["commits that are not in the manifest yet"] += beyond
    foreign = {*parts["shard_id"].to_pylist()} - {*shard_ids}
    findings.expect(layout.PARTS, "parts of other shards", sorted(map(str, foreign)), [])
    paths = {commit.standing.part for commit in inside}
    for path in sorted(records.in_manifest - paths):
        _emit_missing(path, records, findings)
    fold = fold_commits((commit.unpack() for commit in inside), shard_ids)
    if records.complete:
        for key, expected in fold.totals.items():
            got = getattr(manifest, key)
            if key == "statistics" and manifest.labels is not None:
                got, expected = got.model_copy(update=_BY_LABELS), expected.model_copy(update=_BY_LABELS)
            findings.expect(layout.MANIFEST, f"{key} is not the sum of the commits", got, expected)
    else:
        findings.not_checked[_DAMAGED] += 1
        shards = _of(shards, "shard_id", {*fold.shards["shard_id"].to_pylist()})
        parts = _of(parts, "path", paths)
    # A shard whose labels were read again has another index, and may have been packed again.
    renewed = ["index_sha256", "size_bytes"] if manifest.labels is not None else []
    _check_table(layout.SHARDS, shards.drop_columns(["path", *renewed]), fold.shards.drop_columns(renewed), findings)
    _check_table(layout.PARTS, parts, fold.parts, findings)


def _of(table: pa.Table, name: str, values: set[str]) -> pa.Table:
    """The rows whose cell is one of these values."""
    return table.filter(pa.array([value in values for value in table[name].to_pylist()], pa.bool_()))


def _emit_missing(part_path: str, records: StructuredRows, findings: Findings) -> None:
    owner = layout.owner(part_path)
    if owner is None:
        findings.add(Problem(layout.PARTS, "this is not the name of a part", got=part_path))
        return
    path = layout.commit_path(*owner)
    if path not in records.broken:
        what = "the manifest names a part of this block that no commit names"
        findings.add(Problem(path, what, got=part_path, shard=owner[0]))


def _check_table(path: str, got: pa.Table, expected: pa.Table, findings: Findings) -> None:
    """Row by row; the first difference is named."""
    if got.equals(expected):
        return
    what = "this table is not the fold of the commits"
    if got.schema != expected.schema or len(got) != len(expected):
        findings.expect(path, what, (got.schema.names, len(got)), (expected.schema.names, len(expected)))
        return
    for name in expected.schema.names:
        for row, (one, other) in enumerate(zip(got[name].to_pylist(), expected[name].to_pylist(), strict=True)):
            if one != other:
                shard = str(expected["shard_id"][row])
                findings.expect(path, f"{what}: {name}", one, other, shard=shard)
                return
