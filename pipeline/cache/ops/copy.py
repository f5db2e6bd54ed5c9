"""Copies a finished cache from any store to any store.

Each file is compared with its digest where it is read and where it was written. A copy that was interrupted continues:
equal files are not written again. The manifest is last, so an incomplete copy is an unfinished cache.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from pipeline import storage
from pipeline.cache.build.commit import file_digest
from pipeline.cache.build.header_files import header_files
from pipeline.cache.build.manifest import read_table
from pipeline.cache.format import layout
from pipeline.cache.format.files import (
    changed_file,
    check_sha256,
    parse_record,
    publish_named,
    read_file,
    read_named,
)
from pipeline.cache.format.header import find_header
from pipeline.cache.read.moments import find_moments
from pipeline.cache.read.reader import ShardEntry, TeacherCache, open_cache
from pipeline.core.errors import CacheError, StorageError
from pipeline.core.hashing import differences, digest
from pipeline.core.redaction import redact
from pipeline.core.threads import map_ordered
from schemas.cache_format import Commit, FileRef

_NAMED_BY_CONTENT = ("parts/", "means/", layout.RELABELLED, layout.MOMENTS, layout.IMPORTED_MEANS, layout.HEAD)


@dataclass(slots=True)
class CopyReport:
    """The result for a screen or for ``--json``.

    Attributes:
        num_files, num_bytes: of the state of the cache that its manifest describes.
        num_written, bytes_written: those that the destination did not have.
        left_out: files of the source that this state does not consist of, by kind.
    """

    source: str
    destination: str
    num_shards: int
    num_files: int = 0
    num_bytes: int = 0
    num_written: int = 0
    bytes_written: int = 0
    left_out: dict[str, int] = field(default_factory=dict[str, int])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def copy_cache(
    source_url: str, destination_url: str, *, threads: int = 1, progress: Callable[[int, int], None] | None = None
) -> CopyReport:
    """Copies the state of a finished cache that its manifest describes.

    The destination may have an interrupted copy of this cache, or a copy of an earlier state.

    Args:
        progress: called with the number of finished shards and of all shards.

    Raises:
        CacheError: the source is unfinished or damaged, or the destination has another cache.
        StorageInputError: the destination cannot be written.
    """
    cache = open_cache(source_url)
    commits = _commits_by_shard(cache)
    _check_destination(cache, destination_url, {path for paths in commits.values() for path in paths})
    storage.probe(destination_url)
    storage.check_names(destination_url, (Path(layout.index_path(shard.shard_id)).name for shard in cache.shards))
    copying = _Copying(cache, destination_url)
    copying.create(layout.HEADER, copying.read_record(layout.HEADER))
    for path, sha256 in header_files(cache.header).items():
        copying.copy(path, sha256)

    def copy_shard(shard: ShardEntry) -> None:
        copying.copy_shard(shard, commits[shard.shard_id])

    for done, _ in enumerate(map_ordered(copy_shard, cache.shards, threads=threads, name="copy"), start=1):
        if progress is not None:
            progress(done, len(cache.shards))
    return copying.finish()


def _commits_by_shard(cache: TeacherCache) -> dict[str, dict[str, str]]:
    """By shard: path of each commit of the manifest's parts, and the SHA-256 of its part."""
    names = ["shard_id", "path", "part_sha256"]
    parts = read_table(cache.url, cache.manifest.parts).select(names).group_by(names, use_threads=False).aggregate([])
    commits: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for shard, path, sha256 in zip(*(parts[name].to_pylist() for name in names), strict=True):
        owner = layout.owner(path)
        if owner is None:
            where = redact(cache.url)
            raise CacheError("this is not the path of a part", code="cache.part-path", where=where, got=path)
        commits[shard][layout.commit_path(*owner)] = sha256
    return commits


def _check_destination(cache: TeacherCache, destination_url: str, commits: set[str]) -> None:
    """A destination may have nothing that the source does not have as well."""
    changed: list[str] = []
    header = find_header(destination_url)
    if header is not None:
        changed = differences(header.model_dump(mode="json"), cache.header.model_dump(mode="json"))
    if not changed:
        present = (f"commits/{name}" for name in storage.listing(storage.join(destination_url, "commits")))
        changed = [f"{path} is not in the source" for path in present if path not in commits]
    if changed:
        raise _other_cache(destination_url, "; ".join(changed[:5]) + (" …" if len(changed) > 5 else ""))


def _other_cache(destination_url: str, got: str) -> CacheError:
    return CacheError(
        "the destination has another cache",
        code="cache.other-destination",
        where=redact(destination_url),
        got=got,
        expected="an empty folder, or a copy of this cache",
        next_step="choose another destination, or remove that cache",
    )


class _Copying:
    """Copies files one by one. Threads may share it."""

    def __init__(self, cache: TeacherCache, destination_url: str) -> None:
        self._cache, self._destination = cache, destination_url
        self._present = {entry.path for entry in storage.entries(destination_url) if not entry.is_temporary}
        self._copied: set[str] = set()
        self._lock = Lock()
        self._report = CopyReport(redact(cache.url), redact(destination_url), len(cache.shards))

    def copy_shard(self, shard: ShardEntry, commits: dict[str, str]) -> None:
        """Index, parts and class sums, then the commits that name them."""
        relabelled = self._cache.manifest.labels is not None
        if relabelled:
            path = layout.relabelled_path(shard.shard_id, shard.index_sha256)
            self.copy(path, shard.index_sha256)
        for path, part_sha256 in commits.items():
            data = self.read_record(path)
            commit = parse_record(Commit, data, where=redact(storage.join(self._cache.url, path)))
            self._check_commit(path, commit, part_sha256, None if relabelled else shard.index_sha256)
            for ref in (commit.index, commit.part, commit.means):
                if ref is not None and ref.path not in self._copied:
                    self.copy(ref.path, ref.sha256)
            self.create(path, data)

    def _check_commit(self, path: str, commit: Commit, part_sha256: str, index_sha256: str | None) -> None:
        got, expected = (commit.part.sha256, commit.index.sha256), (part_sha256, index_sha256 or commit.index.sha256)
        if got != expected:
            raise changed_file(redact(storage.join(self._cache.url, path)), got=str(got), expected=str(expected))

    def copy(self, path: str, sha256: str) -> None:
        """Copies one file, unless the destination has it.

        Raises:
            CacheError: the source does not have these bytes, or the destination has others that may not be replaced.
            StorageError: the destination does not have them afterwards.
        """
        target = storage.join(self._destination, path)
        with storage.scratch_folder() as scratch:
            size_bytes, got = _digest_at(target, scratch) if path in self._present else (0, None)
            if got is not None and got != sha256 and not path.startswith(_NAMED_BY_CONTENT):
                raise _other_cache(self._destination, f"{path} with sha256 {got[:16]}, not {sha256[:16]}")
            is_new = got != sha256
            if is_new:
                local = storage.local_copy(storage.join(self._cache.url, path), scratch / "source")
                size_bytes = local.stat().st_size
                if (read := file_digest(local)) != sha256:
                    where = redact(storage.join(self._cache.url, path))
                    raise changed_file(where, got=f"sha256 {read[:16]}", expected=sha256[:16])
                storage.put(local, target)
                self._check_written(target, sha256, scratch)
        self._count(path, size_bytes, is_new=is_new)

    def read_record(self, path: str) -> bytes:
        return read_file(self._cache.url, path, max_bytes=storage.MAX_RECORD_BYTES)

    def create(self, path: str, data: bytes) -> None:
        """Copies a record, which has a digest of itself that the caller has checked, and which is never replaced.

        Raises:
            CacheError: the destination has another record.
        """
        target = storage.join(self._destination, path)
        if not storage.create(target, data):
            raise _other_cache(self._destination, f"another {path}")
        check_sha256(storage.read(target), digest(data), where=redact(target))
        self._count(path, len(data), is_new=path not in self._present)

    def _check_written(self, target: str, sha256: str, scratch: Path) -> None:
        if (got := _digest_at(target, scratch / "written")[1]) != sha256:
            raise StorageError(
                "a copied file differs from its source",
                code="storage.copy-differs",
                where=redact(target),
                got=f"sha256 {got[:16]}",
                expected=sha256[:16],
                next_step="remove this file, and run the command again",
            )

    def _count(self, path: str, size_bytes: int, *, is_new: bool) -> None:
        with self._lock:
            self._copied.add(path)
            self._report.num_files += 1
            self._report.num_bytes += size_bytes
            self._report.num_written += is_new
            self._report.bytes_written += size_bytes if is_new else 0

    def finish(self) -> CopyReport:
        """Tables, class means and moments, then the manifest that makes the destination a cache."""
        cache, manifest = self._cache, self._cache.manifest
        for ref in filter(None, (manifest.shards, manifest.parts, manifest.class_means)):
            self._publish(ref)
        if (moments := find_moments(cache)) is not None:
            self.copy(moments.table.path, moments.table.sha256)
            path = layout.moments_path(moments.manifest_sha256)
            self.create(path, self.read_record(path))
        self._publish_manifest()
        self._report.left_out = dict(sorted(_left_out(cache.url, self._copied).items()))
        return self._report

    def _publish(self, ref: FileRef) -> None:
        """A table. That of an earlier state, which it replaces, is stored under its digest."""
        data, target = read_named(self._cache.url, ref), storage.join(self._destination, ref.path)
        is_new = ref.path not in self._present or digest(storage.read(target)) != ref.sha256
        if is_new:
            publish_named(self._destination, ref.path, data)
            check_sha256(storage.read(target), ref.sha256, where=redact(target))
        self._count(ref.path, ref.size_bytes, is_new=is_new)

    def _publish_manifest(self) -> None:
        data, target = self._cache.manifest_bytes, storage.join(self._destination, layout.MANIFEST)
        is_new = layout.MANIFEST not in self._present or storage.read(target) != data
        if is_new:
            storage.write(target, data)
            check_sha256(storage.read(target), digest(data), where=redact(target))
        self._count(layout.MANIFEST, len(data), is_new=is_new)


def _digest_at(url: str, scratch: Path) -> tuple[int, str]:
    """Size in bytes and SHA-256."""
    local = storage.local_copy(url, scratch)
    return local.stat().st_size, file_digest(local)


def _left_out(cache_url: str, copied: set[str]) -> Counter[str]:
    """Files of the source that were not copied, by kind."""
    return Counter(kind for entry in storage.entries(cache_url) if (kind := _kind(entry, copied)) is not None)


def _kind(entry: storage.Entry, copied: set[str]) -> str | None:
    if entry.path in copied:
        return None
    if entry.is_temporary:
        return "temporary files"
    if entry.path.startswith(f"{layout.LOG}/"):
        return "build logs"
    if entry.path.startswith((layout.FORMER, layout.RELABELLED, layout.MOMENTS, layout.CLASS_MEANS)):
        # A relabelled cache has class means for its former labels.
        return "files of former states"
    if layout.is_commit(entry.path):
        return "commits that are not in the manifest"
    return "files that no record of this state names"
