"""Derives a cache from finished caches, without a teacher: blocks one by one, then the manifest.

As in a build, the header is claimed before any work, a commit is the only proof that a block is done, and the manifest
is last. A derivation that was interrupted continues with the blocks that have no commit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.cache.build.blocks import shared_block
from pipeline.cache.build.build_log import BuildLogWriter, remove_logs
from pipeline.cache.build.class_means import ClassSums
from pipeline.cache.build.commit import (
    CommitSummary,
    check_fingerprint,
    file_digest,
    files_present,
    find_commit,
    publish_file,
    read_commit,
    read_commit_summaries,
    revoke,
)
from pipeline.cache.build.header_claim import claim, publish_under_header
from pipeline.cache.build.header_files import header_files
from pipeline.cache.build.manifest import publish_manifest, read_table
from pipeline.cache.build.part_writer import PartWriter, view_ranges
from pipeline.cache.format import layout
from pipeline.cache.format.codec import has_maps, row_bytes
from pipeline.cache.format.files import changed_file, check_sha256, read_file
from pipeline.cache.read.reader import TeacherCache, open_cache
from pipeline.core.bounded_parquet import read_bounded
from pipeline.core.errors import CacheError, ConfigError
from pipeline.core.hashing import differences, digest
from pipeline.core.redaction import quoted, redact
from pipeline.shards.publish import index_name
from pipeline.tasks import task_of
from schemas.cache_format import PIXELS, Commit, FileRef, Header, Manifest, ViewBlock
from schemas.config import CacheConfig


@dataclass(frozen=True, slots=True)
class Derivation:
    """Everything that a process needs to derive a block.

    Attributes:
        sources: URL and manifest of each source, in the order of ``header.derived.sources``; no bytes: it is
            unfinished.
    """

    sources: tuple[tuple[str, bytes], ...]
    destination: str
    header: Header

    def opened(self) -> tuple[TeacherCache, ...]:
        """The finished sources."""
        return tuple(_opened(url, manifest) for url, manifest in self.sources if manifest)


@lru_cache(maxsize=8)
def _opened(url: str, manifest_bytes: bytes) -> TeacherCache:
    """A worker reads a manifest's tables once, not for each block."""
    return open_cache(url, manifest_bytes=manifest_bytes)


Item = tuple[str, ViewBlock]
"""Shard id and block."""
DeriveBlock = Callable[[Derivation, Item], Commit]
Run = Callable[[Callable[[Item], Commit], Sequence[Item]], Iterable[tuple[Item, Commit]]]
"""Applies a function to each item: (item, result) in any order."""


def one_after_another(work: Callable[[Item], Commit], items: Sequence[Item]) -> Iterator[tuple[Item, Commit]]:
    return ((item, work(item)) for item in items)


def open_source(url: str) -> TeacherCache:
    """
    Raises:
        CacheError: there is no finished cache, or its labels were read again after the build.
    """
    cache = open_cache(url)
    if cache.manifest.labels is not None:
        # Its table of shards has places of images for the new labels, and its commits have indexes for the old ones.
        raise CacheError(
            "the labels of this cache were read again after its build",
            code="cache.source-relabelled",
            where=redact(url),
            expected="the labels of the build",
            next_step=f"train from it as it is; or run: stillroom cache copy {quoted(url)} DST on a copy of its state "
            "before cache relabel, derive from that, and relabel the result",
        )
    return cache


def check_several(urls: Sequence[str], command: str) -> None:
    """
    Raises:
        ConfigError: there are fewer than two different sources.
    """
    if len({*urls}) < 2:
        raise ConfigError(
            "this command needs several caches",
            code="config.too-few-sources",
            where=f"stillroom cache {command}",
            got=", ".join(map(redact, urls)),
            expected="two or more different URLs",
        )


def check_equal(bodies: Sequence[tuple[str, Mapping[str, Any]]], what: str, *, code: str, next_step: str) -> None:
    """Compares what must be equal in the headers of all sources: (URL, JSON tree) of each.

    Raises:
        CacheError: two differ; the difference is spelled out.
    """
    (first_url, first), *others = bodies
    for url, body in others:
        if changed := differences(first, body):
            where = f"{redact(first_url)} -> {redact(url)}"
            raise CacheError(what, code=code, where=where, got="; ".join(changed), next_step=next_step)


def manifest_sha256(cache: TeacherCache) -> str:
    return digest(cache.manifest_bytes)


def blocks_of(cache: TeacherCache) -> dict[str, list[ViewBlock]]:
    """The blocks of each shard that the manifest names, the eval pass first."""
    parts = read_table(cache.url, cache.manifest.parts)
    blocks: defaultdict[str, set[ViewBlock]] = defaultdict(set)
    for path in parts["path"].unique().to_pylist():
        owner = layout.owner(path)
        if owner is None:
            raise CacheError(
                "this is not the path of a part", code="cache.part-path", where=redact(cache.url), got=path
            )
        shard, block = owner
        blocks[shard].add(shared_block(block.start, block.stop, block.is_eval))
    return {shard: sorted(found, key=lambda block: (not block.is_eval, block.start)) for shard, found in blocks.items()}


def derive(
    derivation: Derivation,
    derive_block: DeriveBlock,
    items: Sequence[Item],
    shard_urls: Mapping[str, str],
    *,
    run: Run | None = None,
    add_up: Callable[[str, Sequence[FileRef]], ClassSums] | None = None,
) -> Manifest:
    """Derives all blocks that have no commit, and publishes the manifest.

    Args:
        run: for callers that derive blocks in other processes; default: one after another.
        add_up: as in ``publish_manifest``.

    Raises:
        CacheError: the destination has another cache, or a source is damaged.
    """
    url, header = derivation.destination, derivation.header
    storage.probe(url)
    storage.check_names(url, map(index_name, shard_urls))
    claim(url, header)
    source_url = derivation.sources[0][0]
    for path, sha256 in header_files(header).items():
        # Equal in all sources: the digests are part of their fingerprints.
        data = read_file(source_url, path)
        check_sha256(data, sha256, where=redact(storage.join(source_url, path)))
        storage.create(storage.join(url, path), data)
    done = _valid_commits(url)
    open_items = [item for item in items if item not in done]
    num_done = len(items) - len(open_items)
    with BuildLogWriter(url, num_parts=len(items), num_before=num_done) as log:
        work = partial(_derive_once, derivation, derive_block)
        for number, _ in enumerate((run or one_after_another)(work, open_items), start=num_done + 1):
            log.update(number)
    manifest = publish_manifest(url, dict(shard_urls), add_up=add_up)
    remove_logs(url)
    return manifest


def _valid_commits(cache_url: str) -> set[Item]:
    """Revokes commits whose files are missing, as a build does."""
    commits, present = read_commit_summaries(cache_url), files_present(cache_url)
    dangling = [commit for commit in commits if not _named(commit) <= present]
    revoke(cache_url, dangling)
    lost = {id(commit) for commit in dangling}
    return {(commit.shard_id, commit.block) for commit in commits if id(commit) not in lost}


def _named(commit: CommitSummary) -> set[str]:
    return {commit.part, commit.index, *filter(None, [commit.means])}


def _derive_once(derivation: Derivation, derive_block: DeriveBlock, item: Item) -> Commit:
    """A worker may have died after its commit, and another process may derive the same cache."""
    url, header = derivation.destination, derivation.header
    committed = find_commit(url, *item)
    if committed is not None:
        check_fingerprint(committed, header.fingerprint, url)
        return committed
    claim(url, header)
    return publish_under_header(url, header, derive_block(derivation, item))


def source_commit(cache: TeacherCache, item: Item) -> Commit:
    """The commit of a block, compared with the manifest.

    Raises:
        CacheError: it is missing, damaged, or was replaced after the manifest was published.
    """
    shard, block = item
    commit = read_commit(cache.url, layout.commit_path(shard, block))
    for view in commit.views:
        stored = cache.committed_view(shard, view.view)
        if (stored.part_sha256, stored.digest) != (commit.part.sha256, view.digest):
            where = redact(storage.join(cache.url, layout.commit_path(shard, block)))
            raise changed_file(where, got=commit.part.sha256[:16], expected=stored.part_sha256[:16])
    return commit


def fetch(cache_url: str, ref: FileRef, scratch: Path) -> Path:
    """A local path of a file of a source.

    Raises:
        CacheError: its bytes are not those that the record names.
    """
    url = storage.join(cache_url, ref.path)
    local = storage.local_copy(url, scratch)
    if (got := file_digest(local)) != ref.sha256:
        raise changed_file(redact(url), got=f"sha256 {got[:16]}", expected=ref.sha256[:16])
    return local


def publish_same(derivation: Derivation, source_url: str, ref: FileRef | None, scratch: Path) -> None:
    """Publishes a file of a source in the destination under the same path."""
    if ref is not None:
        storage.put(fetch(source_url, ref, scratch), storage.join(derivation.destination, ref.path))


def check_logits(header: Header, kind: str) -> None:
    """
    Raises:
        ConfigError: ``cache.logits`` does not fit the heads of the teacher.
    """
    task = task_of(header.data)
    widths = {output.name: output.shape[-1] for output in header.outputs}
    if task.embedding is not None:
        widths[task.embedding] = header.embedding_dim
    task.outputs(CacheConfig.model_validate({"url": "", "logits": kind}), widths)


def publish_part(
    derivation: Derivation,
    item: Item,
    commit: Commit,
    batches: Iterator[tuple[int, pa.RecordBatch]],
    schema: pa.Schema,
    scratch: Path,
) -> Commit:
    """Publishes a part of these rows, (view, rows) in order, as many of each view as ``commit`` has. Returns the commit
    with its place and digests.
    """
    views = {view.view: view.rows for view in commit.views}
    size_bytes = sum(row_bytes(output) for output in derivation.header.outputs)
    maps = has_maps(derivation.header.outputs)
    with PartWriter(scratch, [*views], schema, row_size_bytes=size_bytes, has_maps=maps) as writer:
        for view, batch in batches:
            writer.add(view, batch)
        part = writer.close()
    ranges, footer = view_ranges(part, views)
    ref = publish_file(derivation.destination, part, layout.part_path(*item))
    fingerprint = derivation.header.fingerprint
    return commit.model_copy(update={"fingerprint": fingerprint, "part": ref, "views": ranges, "footer": footer})


def row_chunks(path: Path, commit: Commit, num_rows: int) -> Iterator[tuple[int, pa.Table]]:
    """(view, rows) of a local part, whose bytes are those of its commit: rows of each view in order, ``num_rows`` at
    a time. Little more than a row group is in memory."""
    with pq.ParquetFile(path) as file:
        metadata, schema = file.metadata, file.schema_arrow
    group, size_bytes = 0, path.stat().st_size
    stored = [name for name in (PIXELS,) if name in schema.names]
    for view in commit.views:
        pending, num_read = schema.empty_table(), 0
        while num_read < view.rows:
            table = read_bounded(path, size_bytes=size_bytes, metadata=metadata, row_groups=[group], distinct=stored)
            group, num_read = group + 1, num_read + len(table)
            pending = pa.concat_tables([pending, table.select(schema.names)])
            while len(pending) >= num_rows or (num_read == view.rows and len(pending)):
                yield view.view, pending.slice(0, num_rows)
                pending = pending.slice(num_rows)
