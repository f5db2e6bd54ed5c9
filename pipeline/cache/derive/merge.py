"""One cache from several of the same teacher, over different shards or different views: their files, byte for byte."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pipeline import storage
from pipeline.cache.build.class_means import ClassSums
from pipeline.cache.build.commit import check_fingerprint, find_commit, read_commit_summaries
from pipeline.cache.build.fold import view_bits
from pipeline.cache.derive.derivation import (
    Derivation,
    Item,
    Run,
    blocks_of,
    check_equal,
    check_several,
    derive,
    manifest_sha256,
    open_source,
    publish_same,
    source_commit,
)
from pipeline.cache.format import layout
from pipeline.cache.format.header import read_header
from pipeline.core.errors import CacheError
from pipeline.core.hashing import canonical_json, digest
from pipeline.core.redaction import redact
from schemas.cache_format import Commit, Derived, FileRef, Header, Manifest, ViewBlock

_COMPARED = ("views", "teacher", "data", "outputs", "pixels")


@dataclass(frozen=True, slots=True)
class MergeSource:
    """A state of a cache. An unfinished one, which has no manifest, is merged by its commits.

    Attributes:
        manifest_bytes: empty: the cache is unfinished.
        sha256: of the manifest, or of the list of its commits.
        index_sha256: by shard id.
        shard_urls: by shard id; empty for an unfinished cache, whose commits do not name them.
    """

    url: str
    header: Header
    manifest_bytes: bytes
    sha256: str
    blocks: dict[str, list[ViewBlock]]
    index_sha256: dict[str, str]
    shard_urls: dict[str, str]

    @classmethod
    def of(cls, url: str) -> MergeSource:
        """
        Raises:
            CacheError: there is no cache, it is damaged, or was relabelled.
        """
        if not storage.exists(storage.join(url, layout.MANIFEST)):
            return cls._unfinished(url)
        cache = open_source(url)
        return cls(
            url,
            cache.header,
            cache.manifest_bytes,
            manifest_sha256(cache),
            blocks_of(cache),
            {shard.shard_id: shard.index_sha256 for shard in cache.shards},
            {shard.shard_id: cache.shard_url(shard) for shard in cache.shards},
        )

    @classmethod
    def _unfinished(cls, url: str) -> MergeSource:
        header, commits = read_header(url), read_commit_summaries(url)
        blocks: defaultdict[str, list[ViewBlock]] = defaultdict(list)
        for commit in commits:
            blocks[commit.shard_id].append(commit.block)
        state = [[commit.shard_id, commit.block.name, commit.part, commit.index_sha256] for commit in commits]
        indexes = {commit.shard_id: commit.index_sha256 for commit in commits}
        return cls(url, header, b"", digest(canonical_json(state)), dict(blocks), indexes, {})


def merge(
    source_urls: Sequence[str],
    destination_url: str,
    *,
    run: Run | None = None,
    add_up: Callable[[str, Sequence[FileRef]], ClassSums] | None = None,
) -> Manifest:
    """Derives the cache. A repeated call continues. Shards have the order of the sources.

    Raises:
        CacheError: the sources are of different teachers, overlap, or differ in the index of a shard; only unfinished
            ones have a shard; or the destination has another cache.
        ConfigError: there are fewer than two sources.
    """
    check_several(source_urls, "merge")
    sources = [MergeSource.of(url) for url in source_urls]
    header = merged_header(sources)
    _check_disjoint(sources)
    urls = _shard_urls(sources)
    derivation = Derivation(tuple((source.url, source.manifest_bytes) for source in sources), destination_url, header)
    items = [(shard, block) for source in sources for shard, blocks in source.blocks.items() for block in blocks]
    return derive(derivation, merge_block, items, urls, run=run, add_up=add_up)


def merged_header(sources: Sequence[MergeSource]) -> Header:
    """
    Raises:
        CacheError: the sources are of different teachers, views, encodings or reading rules.
    """
    check_equal(
        [(source.url, source.header.model_dump(mode="json", include={*_COMPARED})) for source in sources],
        "these caches are not of one teacher, one views plan and one set of encodings",
        code="cache.merge-differs",
        next_step="convert one to the encodings of the other, or train from both: data.cache takes a list",
    )
    derived = Derived(kind="merge", sources=tuple(source.sha256 for source in sources))
    return sources[0].header.model_copy(update={"derived": derived})


def _check_disjoint(sources: Iterable[MergeSource]) -> None:
    covered: defaultdict[str, int] = defaultdict(int)
    indexes: dict[str, tuple[str, str]] = {}
    for source in sources:
        for shard, blocks in source.blocks.items():
            index, url = indexes.setdefault(shard, (source.index_sha256[shard], redact(source.url)))
            if index != source.index_sha256[shard]:
                raise CacheError(
                    "two of these caches have different indexes of a shard",
                    code="cache.merge-index-differs",
                    where=f"{shard}: {url} -> {redact(source.url)}",
                    got=f"{index[:16]} -> {source.index_sha256[shard][:16]}",
                    next_step="build both from the same shards",
                )
            for block in blocks:
                if covered[shard] & view_bits(block):
                    raise CacheError(
                        "two of these caches have the same views of a shard",
                        code="cache.merge-overlap",
                        where=redact(source.url),
                        got=f"block {block.name} of {shard}",
                        expected="different shards, or different views of them",
                        next_step="stillroom cache convert --views or --shards takes a part of a cache",
                    )
                covered[shard] |= view_bits(block)


def _shard_urls(sources: Sequence[MergeSource]) -> dict[str, str]:
    urls: dict[str, str] = {}
    for source in sources:
        urls |= {shard: url for shard, url in source.shard_urls.items() if shard not in urls}
    unknown = {shard: source.url for source in sources for shard in source.blocks if shard not in urls}
    if unknown:
        shard, url = next(iter(unknown.items()))
        raise CacheError(
            "only an unfinished cache has a shard, and does not name its place",
            code="cache.merge-unfinished",
            where=redact(url),
            got=f"{len(unknown)} shards, first {shard}",
            expected="a manifest, or the same shards in a finished source",
            next_step="run: stillroom cache build CONFIG (it resumes), and merge then",
        )
    return urls


def merge_block(derivation: Derivation, item: Item) -> Commit:
    """Publishes the files of a block, and returns its commit, which is not published yet."""
    url, commit = find_source(derivation, item)
    with storage.scratch_folder() as scratch:
        for ref in (commit.index, commit.means, commit.part):
            publish_same(derivation, url, ref, scratch)
    return commit


def find_source(derivation: Derivation, item: Item) -> tuple[str, Commit]:
    """The URL of the source that has a block, and its commit there.

    Raises:
        CacheError: no source has it any more.
    """
    for url, manifest in derivation.sources:
        commit = find_commit(url, *item)
        # A finished source may have commits that are newer than its manifest.
        if commit is not None and (not manifest or _is_in_manifest(derivation, url, item)):
            check_fingerprint(commit, derivation.header.fingerprint, url)
            return url, commit
    raise CacheError(
        "no source has this block any more",
        code="cache.missing-file",
        where=layout.commit_path(*item),
        next_step="restore the source, and run the command again",
    )


def _is_in_manifest(derivation: Derivation, url: str, item: Item) -> bool:
    cache = next(cache for cache in derivation.opened() if cache.url == url)
    try:
        source_commit(cache, item)
    except CacheError as error:
        if error.code == "cache.missing-view":
            return False
        raise
    return True
