"""The fold of all commits into a manifest: what turns finished parts into a cache."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.cache import layout
from pipeline.cache.commit import files_present, read_commits, unnamed
from pipeline.cache.files import parse_record, publish_named, read_file, read_named, read_parquet
from pipeline.cache.identity import read_header
from pipeline.cache.imported import encode_kept, imported_sha256
from pipeline.cache.means import ClassSums, decode_sums, encode_means, merge
from pipeline.cache.statistics import merge_statistics
from pipeline.errors import CacheError
from pipeline.fingerprint import digest, seal
from pipeline.views.params import EVAL_VIEW
from schemas.manifest import Commit, FileRef, Header, Manifest, ViewBlock

_READ_THREADS = 16


def publish_manifest(cache_url: str, shard_urls: dict[str, str]) -> Manifest:
    """Folds the commits of ``shard_urls`` (shard id to URL) into a manifest and removes parts that no commit names.

    Commits of other shards stay, but are not part of this state of the cache.

    Raises:
        CacheError: a shard has no complete view, a commit is of another teacher, a shard changed between two, class
            means are wanted and no row has a label, or imported ones were changed.
    """
    header = read_header(cache_url)
    commits = [commit for commit in read_commits(cache_url) if commit.shard_id in shard_urls]
    _check_commits(commits, header.fingerprint, cache_url)
    fold = fold_commits(commits, shard_urls)
    if fold.totals["num_views"] == 0:
        raise CacheError("no view is complete for every shard", where=storage.redact(cache_url))
    base, names = _relative(shard_urls)
    class_means = _publish_means(cache_url, commits, header)
    paths = pa.array([names[shard] for shard in shard_urls], pa.string())
    manifest = Manifest(
        header_sha256=digest(read_file(cache_url, layout.HEADER)),
        views_id=header.views_id,
        fingerprint=header.fingerprint,
        base=base,
        shards=_publish(cache_url, layout.SHARDS, fold.shards.add_column(1, "path", paths)),
        parts=_publish(cache_url, layout.PARTS, fold.parts),
        class_means=class_means,
        **fold.totals,
    )
    storage.write(storage.join(cache_url, layout.MANIFEST), seal(manifest.model_dump(mode="json")))
    _remove_unnamed(cache_url, commits)
    return manifest


@dataclass(frozen=True, slots=True)
class Fold:
    """What a manifest says of its commits alone: its totals by key, and its two tables, but for the paths of shards."""

    totals: dict[str, Any]
    shards: pa.Table
    parts: pa.Table


def fold_commits(commits: list[Commit], shard_ids: Collection[str]) -> Fold:
    """Commits by path, of no shards but these; shards in the order in which they were asked for.

    ``num_views`` is 0 where some shard lacks view 0.
    """
    by_shard: defaultdict[str, list[Commit]] = defaultdict(list)
    for commit in commits:
        by_shard[commit.shard_id].append(commit)
    num_views = min((_complete_views(by_shard[shard]) for shard in shard_ids), default=0)
    firsts = [by_shard[shard][0] for shard in shard_ids if by_shard[shard]]
    skipped: Counter[str] = Counter()
    for commit in firsts:
        skipped.update(commit.skipped)
    totals: dict[str, Any] = {
        "num_shards": len(firsts),
        "num_samples": sum(commit.read for commit in firsts),
        "num_ok": sum(commit.num_ok for commit in firsts),
        "num_views": num_views,
        "size_bytes": sum(commit.part.size_bytes for commit in commits),
        "skipped": dict(sorted(skipped.items())),
        "statistics": merge_statistics([commit.statistics for commit in commits]),
        "environment": firsts[0].environment if firsts else {},
    }
    return Fold(totals, _shards_table(firsts), _parts_table(commits))


def read_manifest(cache_url: str) -> tuple[Manifest, bytes]:
    """The manifest and its exact bytes, which a run copies.

    Raises:
        CacheError: there is none (the build did not finish), or it is damaged.
    """
    url = storage.join(cache_url, layout.MANIFEST)
    if not storage.exists(url):
        begun = storage.exists(storage.join(cache_url, layout.HEADER))
        raise CacheError(
            "this cache is not finished: it has no manifest" if begun else "there is no cache here",
            where=storage.redact(cache_url),
            next_step="run: stillroom cache build CONFIG" + (" (it resumes)" if begun else ""),
        )
    data = storage.read(url)
    return parse_manifest(data, where=storage.redact(url)), data


def parse_manifest(data: bytes, *, where: str) -> Manifest:
    return parse_record(Manifest, data, where=where)


def read_table(cache_url: str, ref: FileRef) -> pa.Table:
    """A table that the manifest names, checked against its digest."""
    return read_parquet(read_named(cache_url, ref), where=storage.redact(storage.join(cache_url, ref.path)))


def _check_commits(commits: list[Commit], fingerprint: str, cache_url: str) -> None:
    for commit in commits:
        if commit.fingerprint != fingerprint:
            raise CacheError(
                "a commit is of another teacher",
                where=f"{commit.shard_id}/{commit.block.name} in {storage.redact(cache_url)}",
                got=commit.fingerprint,
                wanted=fingerprint,
            )
    firsts: dict[str, Commit] = {}
    for commit in commits:
        first = firsts.setdefault(commit.shard_id, commit)
        if (first.index.sha256, first.shard_size_bytes) != (commit.index.sha256, commit.shard_size_bytes):
            raise CacheError(
                "the shard changed between two of its parts",
                where=f"{commit.shard_id} in {storage.redact(cache_url)}",
                got=f"{commit.block.name}: {commit.shard_size_bytes} bytes, index {commit.index.sha256[:16]}",
                wanted=f"{first.block.name}: {first.shard_size_bytes} bytes, index {first.index.sha256[:16]}",
                next_step="restore the shard and remove the later commits, or build into another cache.url",
            )


def _complete_views(commits: list[Commit]) -> int:
    """The length of the run of views from 0 that is covered."""
    views = {view for commit in commits if not commit.block.is_eval for view in commit.block.views}
    return next(view for view in range(len(views) + 1) if view not in views)


def _relative(shard_urls: dict[str, str]) -> tuple[str, dict[str, str]]:
    """A common base and each shard's path below it: ``locate`` puts them together again.

    Queries are never stored: they may hold secrets. Shards of different stores have no base, and whole URLs for paths.
    """
    plain = {shard: storage.redact(storage.absolute(url)) for shard, url in shard_urls.items()}
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


def _shards_table(firsts: list[Commit]) -> pa.Table:
    return pa.table(
        {
            "shard_id": pa.array([commit.shard_id for commit in firsts], pa.string()),
            "size_bytes": pa.array([commit.shard_size_bytes for commit in firsts], pa.int64()),
            "num_samples": pa.array([commit.read for commit in firsts], pa.int64()),
            "num_ok": pa.array([commit.num_ok for commit in firsts], pa.int64()),
            "index_sha256": pa.array([commit.index.sha256 for commit in firsts], pa.string()),
        }
    )


def _parts_table(commits: list[Commit]) -> pa.Table:
    """One row per (shard, view): all that a reader needs for its one range read."""
    rows = [(commit, view) for commit in commits for view in commit.views]
    return pa.table(
        {
            "shard_id": pa.array([commit.shard_id for commit, _ in rows], pa.string()),
            "view": pa.array([view.view for _, view in rows], pa.uint16()),
            "path": pa.array([commit.part.path for commit, _ in rows], pa.string()),
            "part_sha256": pa.array([commit.part.sha256 for commit, _ in rows], pa.string()),
            "part_size_bytes": pa.array([commit.part.size_bytes for commit, _ in rows], pa.int64()),
            "offset": pa.array([view.offset for _, view in rows], pa.int64()),
            "size_bytes": pa.array([view.size_bytes for _, view in rows], pa.int64()),
            "footer_offset": pa.array([commit.footer.offset for commit, _ in rows], pa.int64()),
            "footer_digest": pa.array([commit.footer.digest for commit, _ in rows], pa.string()),
            "rows": pa.array([view.rows for _, view in rows], pa.int64()),
            "digest": pa.array([view.digest for _, view in rows], pa.string()),
        }
    )


def _publish(cache_url: str, path: str, table: pa.Table) -> FileRef:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return publish_named(cache_url, path, sink.getvalue())


def _publish_means(cache_url: str, commits: list[Commit], header: Header) -> FileRef | None:
    if imported_sha256(header) is not None:
        return publish_named(cache_url, layout.CLASS_MEANS, encode_kept(cache_url, header))
    refs = [commit.means for commit in commits if commit.means is not None]
    if not refs:
        return None
    merged = _merge_sums(cache_url, refs)
    if not len(merged.class_C):
        raise CacheError(
            "class means are wanted, but no row of the whole cache has a label",
            where=storage.redact(cache_url),
            wanted="labelled samples",
            next_step="check data.label, or build into another cache.url with cache.class_means=none",
        )
    return publish_named(cache_url, layout.CLASS_MEANS, encode_means(merged, fingerprint=header.fingerprint))


def _merge_sums(cache_url: str, refs: list[FileRef]) -> ClassSums:
    """The sums of all files, in the memory of a few: of 1,000 classes and 2,048 numbers each file has 16 MB."""
    merged: list[ClassSums] = []
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for start in range(0, len(refs), _READ_THREADS):
            some = pool.map(lambda ref: _read_sums(cache_url, ref), refs[start : start + _READ_THREADS])
            merged = [merge([*merged, *some])]
    return merged[0]


def _read_sums(cache_url: str, ref: FileRef) -> ClassSums:
    return decode_sums(read_named(cache_url, ref), where=storage.redact(storage.join(cache_url, ref.path)))


def _remove_unnamed(cache_url: str, commits: list[Commit]) -> None:
    """Files of builders that were killed or lost a race.

    Only of views that are committed: others may be the work of a builder that is about to commit them.
    """
    done = {key for commit in commits for key in _views_of(commit.shard_id, commit.block)}
    for path in unnamed(commits, files_present(cache_url)):
        owner = layout.owner(path)
        if owner is not None and not done.isdisjoint(_views_of(*owner)):
            storage.delete(storage.join(cache_url, path))


def _views_of(shard_id: str, block: ViewBlock) -> list[tuple[str, int]]:
    return [(shard_id, view) for view in ([EVAL_VIEW] if block.is_eval else block.views)]
