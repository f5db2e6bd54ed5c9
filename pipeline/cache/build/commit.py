"""Publish a part: its files, named by their content, then its commit, which is created once.

Any number of builders may work on the same block. The first commit wins; the others read it and remove their files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline import storage
from pipeline.cache.build.blocks import shared_block
from pipeline.cache.format import layout
from pipeline.cache.format.files import parse_record
from pipeline.core.errors import CacheError
from pipeline.core.hashing import seal
from pipeline.core.redaction import redact
from pipeline.core.threads import map_ordered
from schemas.cache_format import Commit, FileRef, ViewBlock

READ_THREADS = 16


@dataclass(frozen=True, slots=True)
class CommitSummary:
    """The fields of a commit that planning needs. There may be millions: 0.5 kB each in memory, a commit up to 50 kB.

    Attributes:
        part, index, means: paths of files; ``means`` is None if the block has no class sums.
        num_rows: in the part, over all of its views.
    """

    shard_id: str
    shard_size_bytes: int
    block: ViewBlock
    part: str
    part_size_bytes: int
    index: str
    index_sha256: str
    means: str | None
    num_ok: int
    num_rows: int

    @classmethod
    def of(cls, commit: Commit) -> CommitSummary:
        return cls(
            shard_id=commit.shard_id,
            shard_size_bytes=commit.shard_size_bytes,
            block=shared_block(commit.block.start, commit.block.stop, commit.block.is_eval),
            part=commit.part.path,
            part_size_bytes=commit.part.size_bytes,
            index=commit.index.path,
            index_sha256=commit.index.sha256,
            means=commit.means.path if commit.means else None,
            num_ok=commit.num_ok,
            num_rows=sum(view.rows for view in commit.views),
        )


def publish_file(cache_url: str, local: Path, template: str) -> FileRef:
    """Publishes a local file under the path ``template``, with its hash in the place of ``{sha16}``."""
    sha256 = file_digest(local)
    path = template.replace("{sha16}", sha256[:16])
    storage.put(local, storage.join(cache_url, path))
    return FileRef(path=path, sha256=sha256, size_bytes=local.stat().st_size)


def file_digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def publish_commit(cache_url: str, commit: Commit) -> Commit:
    """Publishes a commit, and returns the one in the cache: this one, or that of a faster builder."""
    url = storage.join(cache_url, layout.commit_path(commit.shard_id, commit.block))
    if storage.create(url, seal(commit.model_dump(mode="json"))):
        return commit
    winner = read_commit(cache_url, layout.commit_path(commit.shard_id, commit.block))
    for file, winning in ((commit.part, winner.part), (commit.means, winner.means)):
        # Files of equal content have the same name, so the winner's commit names them too.
        if file is not None and (winning is None or file.path != winning.path):
            storage.delete(storage.join(cache_url, file.path))
    return winner


def check_fingerprint(commit: Commit, fingerprint: str, cache_url: str) -> None:
    """
    Raises:
        CacheError: the commit was published under a header whose fingerprint differs.
    """
    if commit.fingerprint != fingerprint:
        path = layout.commit_path(commit.shard_id, commit.block)
        raise CacheError(
            "a commit was published under another header",
            code="cache.commit-of-another-header",
            where=f"{path} in {redact(cache_url)}",
            got=commit.fingerprint,
            expected=fingerprint,
            next_step="remove this file and run the build again, or build into another cache.url",
        )


def is_unused(cache_url: str) -> bool:
    """Whether nothing is committed to this cache: it has neither a commit nor a manifest."""
    names = storage.listing(storage.join(cache_url, "commits"))
    has_commits = any(layout.is_commit(f"commits/{name}") for name in names)
    return not has_commits and not storage.exists(storage.join(cache_url, layout.MANIFEST))


def find_commit(cache_url: str, shard_id: str, block: ViewBlock) -> Commit | None:
    """The commit of a block, or None if there is none yet."""
    url = storage.join(cache_url, layout.commit_path(shard_id, block))
    data = storage.read_if_exists(url, max_bytes=storage.MAX_RECORD_BYTES)
    return None if data is None else parse_record(Commit, data, where=redact(url))


def read_commit(cache_url: str, path: str) -> Commit:
    """
    Raises:
        CacheError: the commit was changed after it was written, or has another format version.
    """
    url = storage.join(cache_url, path)
    return parse_record(Commit, storage.read(url, max_bytes=storage.MAX_RECORD_BYTES), where=redact(url))


def stream_commits(cache_url: str) -> Iterator[Commit]:
    """Every commit of a cache, by shard and block. The listing of commits is the only proof of finished work.

    Only a few commits are in memory at a time.
    """
    paths = [f"commits/{name}" for name in storage.listing(storage.join(cache_url, "commits"))]
    yield from map_ordered(
        lambda path: read_commit(cache_url, path),
        filter(layout.is_commit, paths),
        threads=READ_THREADS,
        ahead=4 * READ_THREADS,
    )


def read_commit_summaries(cache_url: str) -> list[CommitSummary]:
    """A summary of every commit, by shard and block."""
    return [CommitSummary.of(commit) for commit in stream_commits(cache_url)]


def files_present(cache_url: str) -> set[str]:
    """Every part, file of class sums and index, by three listings.

    Call this after reading the commits: a file is published before its commit, so no file can seem to be missing.
    """
    folders = ("parts", "means", layout.INDEX)
    return {f"{folder}/{name}" for folder in folders for name in storage.listing(storage.join(cache_url, folder))}


def named_files(commits: Iterable[Commit]) -> set[str]:
    """Every part, file of class sums and index that a commit names."""
    return {ref.path for commit in commits for ref in (commit.part, commit.means, commit.index) if ref is not None}


def is_dangling(commit: CommitSummary, present: set[str]) -> bool:
    """Whether the part or the class sums that this commit names are missing."""
    return any(path is not None and path not in present for path in (commit.part, commit.means))


def revoke(cache_url: str, commits: list[CommitSummary]) -> None:
    """Removes commits that are dangling, or whose header was removed.

    Commits are created only if absent, so a build could never replace them.
    """
    for commit in commits:
        storage.delete(storage.join(cache_url, layout.commit_path(commit.shard_id, commit.block)))
