"""The fold of all commits into a manifest: what turns finished parts into a cache."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.cache.build.class_means import ClassSums, decode_sums, encode_means, merge
from pipeline.cache.build.commit import check_fingerprint, files_present, named, stream_commits
from pipeline.cache.build.imported_means import encode_kept, imported_sha256
from pipeline.cache.build.statistics import StatisticsFold
from pipeline.cache.format import layout
from pipeline.cache.format.files import parse_record, publish_named, read_file, read_named, read_parquet
from pipeline.cache.format.header import no_cache, read_header
from pipeline.core.errors import CacheError
from pipeline.core.hashing import canonical_json, digest, seal
from pipeline.core.redaction import redact
from schemas.cache_format import Commit, FileRef, Header, Manifest, ViewBlock

_READ_THREADS = 16
# Rows of the table of parts that are held as Python's objects, before they become columns.
_ROWS_AT_ONCE = 100_000


def publish_manifest(
    cache_url: str,
    shard_urls: dict[str, str],
    *,
    add_up: Callable[[str, Sequence[FileRef]], ClassSums] | None = None,
) -> Manifest:
    """Folds the commits of ``shard_urls`` (shard id to URL) into a manifest and removes parts that no commit names.

    Commits of other shards stay, but are not part of this state of the cache.

    Args:
        add_up: the sums of all these files of the cache, for who has other processes read them; ``read_sums``.

    Raises:
        CacheError: a shard has no complete view, a commit is of another teacher, a shard changed between two, class
            means are wanted and no row has a label, or imported ones were changed.
    """
    header = read_header(cache_url)
    seen = _Seen(header.fingerprint, cache_url)
    fold = fold_commits(
        seen.checked(commit for commit in stream_commits(cache_url) if commit.shard_id in shard_urls), shard_urls
    )
    if fold.totals["num_views"] == 0:
        raise CacheError("no view is complete for every shard", where=redact(cache_url))
    if (relabelled := _still_relabelled(cache_url, fold)) is not None:
        _remove_unnamed(cache_url, seen)
        return relabelled
    base, names = relative(shard_urls)
    class_means = _publish_means(cache_url, seen.means, header, add_up or read_sums)
    paths = pa.array([names[shard] for shard in shard_urls], pa.string())
    manifest = Manifest(
        header_sha256=digest(read_file(cache_url, layout.HEADER, max_bytes=storage.MAX_RECORD_BYTES)),
        views_id=header.views_id,
        fingerprint=header.fingerprint,
        base=base,
        shards=publish_shards(cache_url, fold.shards.add_column(1, "path", paths)),
        parts=_publish(cache_url, layout.PARTS, fold.parts),
        class_means=class_means,
        **fold.totals,
    )
    write_manifest(cache_url, manifest)
    _remove_unnamed(cache_url, seen)
    return manifest


def publish_shards(cache_url: str, table: pa.Table) -> FileRef:
    """The table of shards under its name; the one it replaces stays under its digest."""
    return _publish(cache_url, layout.SHARDS, table)


def write_manifest(cache_url: str, manifest: Manifest) -> None:
    storage.write(storage.join(cache_url, layout.MANIFEST), seal(manifest.model_dump(mode="json")))


def find_relabelled(cache_url: str) -> Manifest | None:
    """The manifest, if its labels were read again after the build."""
    url = storage.join(cache_url, layout.MANIFEST)
    data = storage.read_if_there(url, max_bytes=storage.MAX_RECORD_BYTES)
    if data is None:
        return None
    try:
        manifest = parse_manifest(data, where=redact(url))
    except CacheError:
        # It is damaged, and the build that asks is about to replace it.
        return None
    return manifest if manifest.labels is not None else None


def _still_relabelled(cache_url: str, fold: Fold) -> Manifest | None:
    """The manifest as it is, where nothing was built since its labels were read again. Else their labels go: parts and
    shards that came later have those of the build alone."""
    found = find_relabelled(cache_url)
    if found is None:
        return None
    same_shards = read_table(cache_url, found.shards)["shard_id"].equals(fold.shards["shard_id"])
    return found if same_shards and read_table(cache_url, found.parts).equals(fold.parts) else None


@dataclass(frozen=True, slots=True)
class Fold:
    """What a manifest says of its commits alone: its totals by key, and its two tables, but for the paths of shards."""

    totals: dict[str, Any]
    shards: pa.Table
    parts: pa.Table


def fold_commits(commits: Iterable[Commit], shard_ids: Collection[str]) -> Fold:
    """Commits by path, of no shards but these; shards in the order in which they were asked for.

    Each commit is forgotten once it is folded: a cache may have more of them than memory holds.
    ``num_views`` is 0 where some shard lacks view 0.
    """
    by_shard: dict[str, _Shard] = {}
    covered: defaultdict[str, int] = defaultdict(int)
    environments: dict[bytes, dict[str, Any]] = {}
    statistics, parts, size_bytes = StatisticsFold(), _PartsTable(), 0
    for commit in commits:
        shard = commit.shard_id
        if shard not in by_shard:
            # Most are equal, and then one is kept of them.
            environment = environments.setdefault(canonical_json(commit.environment), commit.environment)
            by_shard[shard] = _Shard(
                shard,
                commit.shard_size_bytes,
                commit.read,
                commit.num_ok,
                commit.index.sha256,
                commit.skipped,
                environment,
            )
        covered[shard] |= _bits(commit.block)
        statistics.add(commit.statistics)
        parts.add(commit)
        size_bytes += commit.part.size_bytes
    firsts = [by_shard[shard] for shard in shard_ids if shard in by_shard]
    skipped: Counter[str] = Counter()
    for first in firsts:
        skipped.update(first.skipped)
    totals: dict[str, Any] = {
        "num_shards": len(firsts),
        "num_samples": sum(first.num_samples for first in firsts),
        "num_ok": sum(first.num_ok for first in firsts),
        "num_views": min((_complete_views(covered[shard]) for shard in shard_ids), default=0),
        "size_bytes": size_bytes,
        "skipped": dict(sorted(skipped.items())),
        "statistics": statistics.result(),
        "environment": firsts[0].environment if firsts else {},
    }
    return Fold(totals, _shards_table(firsts), parts.result())


@dataclass(frozen=True, slots=True)
class _Shard:
    """What a shard's first commit says of the shard."""

    shard_id: str
    size_bytes: int
    num_samples: int
    num_ok: int
    index_sha256: str
    skipped: dict[str, int]
    environment: dict[str, Any]


def read_manifest(cache_url: str) -> tuple[Manifest, bytes]:
    """The manifest and its exact bytes, which a run copies.

    Raises:
        CacheError: there is none (the build did not finish), or it is damaged.
    """
    url = storage.join(cache_url, layout.MANIFEST)
    data = storage.read_if_there(url, max_bytes=storage.MAX_RECORD_BYTES)
    if data is None:
        if not storage.exists(storage.join(cache_url, layout.HEADER)):
            raise no_cache(cache_url)
        raise CacheError(
            "this cache is not finished: it has no manifest",
            code="cache.unfinished",
            where=redact(cache_url),
            next_step="run: stillroom cache build CONFIG (it resumes)",
        )
    return parse_manifest(data, where=redact(url)), data


def parse_manifest(data: bytes, *, where: str) -> Manifest:
    return parse_record(Manifest, data, where=where)


def read_table(cache_url: str, ref: FileRef, *, repeated: Sequence[str] = ()) -> pa.Table:
    """A table that the manifest names, checked against its digest; ``repeated`` as ``read_parquet`` takes it."""
    where = redact(storage.join(cache_url, ref.path))
    return read_parquet(read_named(cache_url, ref), where=where, repeated=repeated)


@dataclass(slots=True)
class _Seen:
    """Checks commits as they pass, and keeps what is needed of them after the fold."""

    fingerprint: str
    cache_url: str
    named: set[str] = field(default_factory=set)
    means: list[FileRef] = field(default_factory=list)
    covered: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    _firsts: dict[str, tuple[str, str, int]] = field(default_factory=dict)

    def checked(self, commits: Iterable[Commit]) -> Iterator[Commit]:
        for commit in commits:
            self._check(commit)
            self.named |= named([commit])
            self.covered[commit.shard_id] |= _bits(commit.block)
            if commit.means is not None:
                self.means.append(commit.means)
            yield commit

    def _check(self, commit: Commit) -> None:
        check_fingerprint(commit, self.fingerprint, self.cache_url)
        own = (commit.block.name, commit.index.sha256, commit.shard_size_bytes)
        first = self._firsts.setdefault(commit.shard_id, own)
        if first[1:] != own[1:]:
            raise CacheError(
                "the shard changed between two of its parts",
                where=f"{commit.shard_id} in {redact(self.cache_url)}",
                got=_block_of(*own),
                expected=_block_of(*first),
                next_step="restore the shard and remove the later commits, or build into another cache.url",
            )


def _block_of(name: str, index_sha256: str, shard_size_bytes: int) -> str:
    return f"{name}: {shard_size_bytes} bytes, index {index_sha256[:16]}"


def _bits(block: ViewBlock) -> int:
    """The views of a block as bits, the eval pass as the lowest: a set of 50 takes 2 kB, and there is one a shard."""
    return 1 if block.is_eval else ((1 << len(block.views)) - 1) << (block.start + 1)


def _complete_views(covered: int) -> int:
    """The length of the run of views from 0 that is covered."""
    views = covered >> 1
    # The lowest bit that is not set.
    return (~views & (views + 1)).bit_length() - 1


def relative(shard_urls: dict[str, str]) -> tuple[str, dict[str, str]]:
    """A common base and each shard's path below it: ``locate`` puts them together again.

    Queries are never stored: they may hold secrets. Shards of different stores have no base, and whole URLs for paths.
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
    """The URL of a shard from a manifest's base and its path in the table of shards."""
    return path if "://" in path or path.startswith("/") else storage.join(base, path)


def _shards_table(firsts: list[_Shard]) -> pa.Table:
    return pa.table(
        {
            "shard_id": pa.array([first.shard_id for first in firsts], pa.string()),
            "size_bytes": pa.array([first.size_bytes for first in firsts], pa.int64()),
            "num_samples": pa.array([first.num_samples for first in firsts], pa.int64()),
            "num_ok": pa.array([first.num_ok for first in firsts], pa.int64()),
            "index_sha256": pa.array([first.index_sha256 for first in firsts], pa.string()),
        }
    )


_PARTS_SCHEMA = pa.schema(
    {
        "shard_id": pa.string(),
        "view": pa.uint16(),
        "path": pa.string(),
        "part_sha256": pa.string(),
        "part_size_bytes": pa.int64(),
        "offset": pa.int64(),
        "size_bytes": pa.int64(),
        "footer_offset": pa.int64(),
        "footer_digest": pa.string(),
        "rows": pa.int64(),
        "digest": pa.string(),
    }
)


class _PartsTable:
    """One row per (shard, view): all that a reader needs for its one range read."""

    def __init__(self) -> None:
        self._batches: list[pa.RecordBatch] = []
        self._rows: list[tuple[str | int, ...]] = []

    def add(self, commit: Commit) -> None:
        part, footer = commit.part, commit.footer
        self._rows.extend(
            (
                *(commit.shard_id, view.view, part.path, part.sha256, part.size_bytes),
                *(view.offset, view.size_bytes, footer.offset, footer.digest, view.rows, view.digest),
            )
            for view in commit.views
        )
        if len(self._rows) >= _ROWS_AT_ONCE:
            self._pack()

    def _pack(self) -> None:
        columns = zip(*self._rows, strict=True)
        arrays = [pa.array(column, item.type) for column, item in zip(columns, _PARTS_SCHEMA, strict=True)]
        self._batches.append(pa.record_batch(arrays, schema=_PARTS_SCHEMA))
        self._rows = []

    def result(self) -> pa.Table:
        if self._rows:
            self._pack()
        return pa.Table.from_batches(self._batches, _PARTS_SCHEMA)


def _publish(cache_url: str, path: str, table: pa.Table) -> FileRef:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return publish_named(cache_url, path, sink.getvalue())


def _publish_means(
    cache_url: str, refs: list[FileRef], header: Header, add_up: Callable[[str, Sequence[FileRef]], ClassSums]
) -> FileRef | None:
    if imported_sha256(header) is not None:
        return publish_named(cache_url, layout.CLASS_MEANS, encode_kept(cache_url, header))
    if not refs:
        return None
    merged = add_up(cache_url, refs)
    if not len(merged.class_C):
        raise CacheError(
            "class means are wanted, but no row of the whole cache has a label",
            where=redact(cache_url),
            expected="labelled samples",
            next_step="check data.label, or build into another cache.url with cache.class_means=none",
        )
    return publish_named(cache_url, layout.CLASS_MEANS, encode_means(merged, fingerprint=header.fingerprint))


def read_sums(cache_url: str, refs: Sequence[FileRef]) -> ClassSums:
    """The sums of all files, in the memory of a few: of 1,000 classes and 2,048 numbers each file has 16 MB."""
    merged: list[ClassSums] = []
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for start in range(0, len(refs), _READ_THREADS):
            some = pool.map(lambda ref: _read_sums(cache_url, ref), refs[start : start + _READ_THREADS])
            merged = [merge([*merged, *some])]
    return merged[0]


def _read_sums(cache_url: str, ref: FileRef) -> ClassSums:
    return decode_sums(read_named(cache_url, ref), where=redact(storage.join(cache_url, ref.path)))


def _remove_unnamed(cache_url: str, seen: _Seen) -> None:
    """Files of builders that were killed or lost a race.

    Only of views that are committed: others may be the work of a builder that is about to commit them.
    """
    for path in files_present(cache_url) - seen.named:
        owner = layout.owner(path)
        if owner is not None and seen.covered[owner[0]] & _bits(owner[1]):
            storage.delete(storage.join(cache_url, path))
