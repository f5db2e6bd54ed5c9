"""Publish and read the manifest, which turns committed parts into a cache."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.cache.build.class_means import ClassSums, decode_sums, encode_means, merge
from pipeline.cache.build.commit import check_fingerprint, files_present, named_files, stream_commits
from pipeline.cache.build.fold import Fold, fold_commits, view_bits
from pipeline.cache.build.imported_means import encode_stored, imported_sha256
from pipeline.cache.format import layout
from pipeline.cache.format.files import parse_record, publish_named, read_file, read_named, read_parquet
from pipeline.cache.format.head_file import read_head
from pipeline.cache.format.header import no_cache, read_header
from pipeline.core.errors import CacheError
from pipeline.core.hashing import digest, seal
from pipeline.core.redaction import redact
from pipeline.tasks import task_of
from schemas.cache_format import Commit, FileRef, Header, Manifest

_READ_THREADS = 16


def publish_manifest(
    cache_url: str,
    shard_urls: dict[str, str],
    *,
    add_up: Callable[[str, Sequence[FileRef]], ClassSums] | None = None,
) -> Manifest:
    """Folds the commits of ``shard_urls`` (shard id to URL) into a manifest, and removes parts that no commit names.

    Commits of other shards remain, but are not part of this state of the cache.

    Args:
        add_up: adds up the class sums in these files of the cache, for callers that read them in other processes.
            Default: ``read_sums``.

    Raises:
        CacheError: no view is complete for every shard; a commit is another teacher's; a shard changed between two
            parts; class means are configured and no row has a label; or the imported class means, or the linear head,
            were changed.
    """
    header = read_header(cache_url)
    read_head(cache_url, header)
    checks = _CommitChecks(header.fingerprint, cache_url)
    commits = (commit for commit in stream_commits(cache_url) if commit.shard_id in shard_urls)
    fold = fold_commits(checks.checked(commits), shard_urls, task_of(header.data))
    if fold.totals["num_views"] == 0:
        raise CacheError(
            "no view is complete for every shard",
            code="cache.no-complete-view",
            where=redact(cache_url),
            next_step="run: stillroom cache build CONFIG (it resumes)",
        )
    manifest = _find_unchanged_relabelled(cache_url, fold)
    if manifest is None:
        base, paths = relative(shard_urls)
        class_means = _publish_means(cache_url, checks.sums, header, add_up or read_sums)
        path_column = pa.array([paths[shard] for shard in shard_urls], pa.string())
        manifest = Manifest(
            header_sha256=digest(read_file(cache_url, layout.HEADER, max_bytes=storage.MAX_RECORD_BYTES)),
            views_id=header.views_id,
            fingerprint=header.fingerprint,
            base=base,
            shards=publish_shards(cache_url, fold.shards.add_column(1, "path", path_column)),
            parts=_publish(cache_url, layout.PARTS, fold.parts),
            class_means=class_means,
            **fold.totals,
        )
        write_manifest(cache_url, manifest)
    _remove_unnamed(cache_url, checks)
    return manifest


def publish_shards(cache_url: str, table: pa.Table) -> FileRef:
    """Publishes the table of shards; the table that it replaces is stored under its digest."""
    return _publish(cache_url, layout.SHARDS, table)


def write_manifest(cache_url: str, manifest: Manifest) -> None:
    storage.write(storage.join(cache_url, layout.MANIFEST), seal(manifest.model_dump(mode="json")))


def find_relabelled(cache_url: str) -> Manifest | None:
    """The manifest, if its labels were read again after the build."""
    url = storage.join(cache_url, layout.MANIFEST)
    data = storage.read_if_exists(url, max_bytes=storage.MAX_RECORD_BYTES)
    if data is None:
        return None
    try:
        manifest = parse_manifest(data, where=redact(url))
    except CacheError:
        # It is damaged, and the calling build is about to replace it.
        return None
    return manifest if manifest.labels is not None else None


def _find_unchanged_relabelled(cache_url: str, fold: Fold) -> Manifest | None:
    """The relabelled manifest, if nothing was built since. Otherwise the new manifest loses these labels, because later
    parts and shards have only those of the build."""
    manifest = find_relabelled(cache_url)
    if manifest is None:
        return None
    same_shards = read_table(cache_url, manifest.shards)["shard_id"].equals(fold.shards["shard_id"])
    return manifest if same_shards and read_table(cache_url, manifest.parts).equals(fold.parts) else None


def read_manifest(cache_url: str) -> tuple[Manifest, bytes]:
    """The manifest and its exact bytes, which a run copies.

    Raises:
        CacheError: there is none (the build did not finish), or it is damaged.
    """
    url = storage.join(cache_url, layout.MANIFEST)
    data = storage.read_if_exists(url, max_bytes=storage.MAX_RECORD_BYTES)
    if data is None:
        if not storage.exists(storage.join(cache_url, layout.HEADER)):
            raise no_cache(cache_url)
        raise CacheError(
            "this cache is unfinished: it has no manifest",
            code="cache.unfinished",
            where=redact(cache_url),
            next_step="run: stillroom cache build CONFIG (it resumes)",
        )
    return parse_manifest(data, where=redact(url)), data


def parse_manifest(data: bytes, *, where: str) -> Manifest:
    return parse_record(Manifest, data, where=where)


def read_table(cache_url: str, ref: FileRef, *, repeated: Sequence[str] = ()) -> pa.Table:
    """A table that the manifest names, checked against its digest. ``repeated``: see ``read_parquet``."""
    where = redact(storage.join(cache_url, ref.path))
    return read_parquet(read_named(cache_url, ref), where=where, repeated=repeated)


@dataclass(slots=True)
class _CommitChecks:
    """Checks commits during the fold, and collects what publishing needs of them afterwards."""

    fingerprint: str
    cache_url: str
    named: set[str] = field(default_factory=set)
    sums: list[FileRef] = field(default_factory=list)
    covered: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    _firsts: dict[str, tuple[str, str, int]] = field(default_factory=dict)

    def checked(self, commits: Iterable[Commit]) -> Iterator[Commit]:
        for commit in commits:
            self._check(commit)
            self.named |= named_files([commit])
            self.covered[commit.shard_id] |= view_bits(commit.block)
            if commit.means is not None:
                self.sums.append(commit.means)
            yield commit

    def _check(self, commit: Commit) -> None:
        check_fingerprint(commit, self.fingerprint, self.cache_url)
        shard = (commit.block.name, commit.index.sha256, commit.shard_size_bytes)
        first = self._firsts.setdefault(commit.shard_id, shard)
        if first[1:] != shard[1:]:
            raise CacheError(
                "the shard changed between two of its parts",
                code="cache.shard-changed-between-parts",
                where=f"{commit.shard_id} in {redact(self.cache_url)}",
                got=_described(*shard),
                expected=_described(*first),
                next_step="restore the shard and remove the later commits, or build into another cache.url",
            )


def _described(block: str, index_sha256: str, shard_size_bytes: int) -> str:
    return f"{block}: {shard_size_bytes} bytes, index {index_sha256[:16]}"


def relative(shard_urls: dict[str, str]) -> tuple[str, dict[str, str]]:
    """A common base URL, and the path of each shard below it. ``locate`` is the inverse.

    Queries are never stored, because they may hold secrets. Shards of several stores have no base, and whole URLs for
    paths.
    """
    plain = {shard: redact(storage.absolute(url)) for shard, url in shard_urls.items()}
    levels = [url.split("/")[:-1] for url in plain.values()]
    num_common = next((at for at, names in enumerate(zip(*levels, strict=False)) if len({*names}) > 1), None)
    common = levels[0][: min(map(len, levels)) if num_common is None else num_common]
    base = "/".join(common)
    if any("://" in url for url in plain.values()) and not base.partition("://")[2]:
        return "", plain
    return base, {shard: url[len(base) + 1 :] for shard, url in plain.items()}


def locate(base: str, path: str) -> str:
    """The URL of a shard, from a manifest's base and the shard's path in the table of shards."""
    return path if "://" in path or path.startswith("/") else storage.join(base, path)


def _publish(cache_url: str, path: str, table: pa.Table) -> FileRef:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return publish_named(cache_url, path, sink.getvalue())


def _publish_means(
    cache_url: str, refs: list[FileRef], header: Header, add_up: Callable[[str, Sequence[FileRef]], ClassSums]
) -> FileRef | None:
    if imported_sha256(header) is not None:
        return publish_named(cache_url, layout.CLASS_MEANS, encode_stored(cache_url, header))
    if not refs:
        return None
    sums = add_up(cache_url, refs)
    if not len(sums.class_C):
        raise CacheError(
            "class means are configured, but no row of the cache has a label",
            code="cache.no-labels",
            where=redact(cache_url),
            expected="labelled samples",
            next_step="check data.label, or build into another cache.url with cache.class_means=none",
        )
    return publish_named(cache_url, layout.CLASS_MEANS, encode_means(sums, fingerprint=header.fingerprint))


def read_sums(cache_url: str, refs: Sequence[FileRef]) -> ClassSums:
    """The sums of all files, with a few in memory at a time: 1,000 classes of 2,048 numbers take 16 MB a file."""
    total: list[ClassSums] = []
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for start in range(0, len(refs), _READ_THREADS):
            sums = pool.map(lambda ref: _read_sums(cache_url, ref), refs[start : start + _READ_THREADS])
            total = [merge([*total, *sums])]
    return total[0]


def _read_sums(cache_url: str, ref: FileRef) -> ClassSums:
    return decode_sums(read_named(cache_url, ref), where=redact(storage.join(cache_url, ref.path)))


def _remove_unnamed(cache_url: str, checks: _CommitChecks) -> None:
    """Removes files of builders that were killed or lost a race.

    Only files of committed views: any other file may be that of a builder that is about to commit it.
    """
    for path in files_present(cache_url) - checks.named:
        owner = layout.owner(path)
        if owner is not None and checks.covered[owner[0]] & view_bits(owner[1]):
            storage.delete(storage.join(cache_url, path))
