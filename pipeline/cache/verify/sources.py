"""Compares a derived cache with the caches that it was made from: every block is derived again, and compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa

from pipeline import storage
from pipeline.cache.derive.average import AverageRequest, BlockAverager, averaged_header
from pipeline.cache.derive.convert import BlockConverter, converted_header
from pipeline.cache.derive.derivation import (
    Derivation,
    Item,
    blocks_of,
    fetch,
    row_chunks,
    source_commit,
)
from pipeline.cache.derive.merge import MergeSource, find_source, merged_header
from pipeline.cache.format import layout
from pipeline.cache.read.reader import TeacherCache, open_cache
from pipeline.cache.verify.report import Findings, Problem
from pipeline.core.errors import ConfigError
from pipeline.core.redaction import redact
from pipeline.core.threads import map_ordered
from schemas.cache_format import Commit


def compare_with_sources(
    cache_url: str,
    source_urls: Sequence[str],
    findings: Findings,
    *,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Adds a problem for each block that differs from what its sources give.

    Args:
        findings: receives the problems.
        progress: called with the number of finished blocks and of all blocks.

    Raises:
        ConfigError: the cache was not derived from others, or another cache is named.
    """
    cache = open_cache(cache_url)
    derivation = _derivation(cache, source_urls)
    with findings.capture(layout.HEADER):
        _check_header(cache, derivation, findings)
    items = [(shard, block) for shard, blocks in blocks_of(cache).items() for block in blocks]

    def compare(item: Item) -> Findings:
        found = Findings()
        with found.capture(layout.commit_path(*item), "blocks against their sources", shard=item[0]):
            _compare_block(cache, derivation, item, found)
        return found

    for done, found in enumerate(map_ordered(compare, items, threads=threads, name="sources"), start=1):
        findings.merge(found)
        if progress is not None:
            progress(done, len(items))


def _derivation(cache: TeacherCache, source_urls: Sequence[str]) -> Derivation:
    derived = cache.header.derived
    if derived is None:
        raise ConfigError(
            "this cache was not derived from other caches",
            code="cache.not-derived",
            where=redact(cache.url),
            next_step="leave out --source; to compare a cache with its teacher, pass --config",
        )
    opened = {source.sha256: source for source in map(MergeSource.of, source_urls)}
    missing = [sha256 for sha256 in derived.sources if sha256 not in opened]
    if missing or len(opened) > len(derived.sources):
        raise ConfigError(
            "this cache was derived from other caches, or from another state of them",
            code="cache.other-source",
            where="--source",
            got=", ".join(f"{redact(source.url)} (manifest {sha256[:16]})" for sha256, source in opened.items()),
            expected=f"manifests {', '.join(sha256[:16] for sha256 in derived.sources)}",
            next_step="name each of its sources; one that was extended or relabelled since has another manifest",
        )
    sources = tuple((opened[sha256].url, opened[sha256].manifest_bytes) for sha256 in derived.sources)
    return Derivation(sources, cache.url, cache.header)


def _check_header(cache: TeacherCache, derivation: Derivation, findings: Findings) -> None:
    header = cache.header
    assert header.derived is not None
    if header.derived.kind == "merge":
        expected = merged_header([MergeSource.of(url) for url, _ in derivation.sources])
    elif header.derived.kind == "average":
        body = header.teacher["average"]
        request = AverageRequest(tuple(body["weights"]), body["temperature"], str(header.teacher["logits"]))
        expected = averaged_header(derivation.opened(), request)
    else:
        (source,) = derivation.opened()
        expected = converted_header(source, {key: kind for key, (_, kind) in header.derived.encodings.items()})
    findings.expect(layout.HEADER, "this header does not follow from the source", header, expected)


def _compare_block(cache: TeacherCache, derivation: Derivation, item: Item, findings: Findings) -> None:
    path, shard, got = layout.commit_path(*item), item[0], source_commit(cache, item)
    what = "this commit differs from that of the source"
    if cache.header.derived is not None and cache.header.derived.kind == "merge":
        findings.expect(path, what, got, find_source(derivation, item)[1], shard=shard)
        return
    sources = derivation.opened()
    commits = [source_commit(source, item) for source in sources]
    if cache.header.fingerprint == sources[0].header.fingerprint:
        findings.expect(path, what, got, commits[0], shard=shard)
        return
    rows = [{view.view: view.rows for view in commit.views} for commit in (got, commits[0])]
    if not findings.expect(path, "rows by view", rows[0], rows[1], shard=shard):
        return
    with storage.scratch_folder() as scratch:
        part = fetch(cache.url, got.part, scratch)
        parts = [fetch(source.url, commit.part, scratch) for source, commit in zip(sources, commits, strict=True)]
        if cache.header.derived is not None and cache.header.derived.kind == "average":
            deriver = BlockAverager(sources, cache.header, commits, parts)
        else:
            deriver = BlockConverter(sources[0], cache.header, commits[0], parts[0])
        for (view, batch), (_, chunk) in zip(deriver.batches(), row_chunks(part, got, deriver.chunk_rows), strict=True):
            _compare_rows(got, view, batch, chunk, findings)
    names = ("index", "num_ok", "read", "skipped", "environment")
    same = {name: getattr(commits[0], name) for name in names}
    same["means"] = None if isinstance(deriver, BlockAverager) else commits[0].means
    for name, value in {**same, "statistics": deriver.statistics()}.items():
        what = f"{name} of this commit differs from what the sources give"
        findings.expect(path, what, getattr(got, name), value, shard=shard)


def _compare_rows(commit: Commit, view: int, expected: pa.RecordBatch, got: pa.Table, findings: Findings) -> None:
    """Adds a problem for each column that differs, with the number of its rows."""
    path, shard = commit.part.path, commit.shard_id
    findings.checked["rows against their sources"] += len(got)
    names = got.schema.names
    if not findings.expect(path, "columns that the source gives", names, expected.schema.names, shard=shard):
        return
    for name in names:
        column = got[name].combine_chunks()
        if not column.equals(expected[name]):
            cells = zip(column.to_pylist(), expected[name].to_pylist(), strict=True)
            num_wrong = sum(cell != other for cell, other in cells)
            what = f"{name} differs from what the source gives"
            findings.add(Problem(path, what, shard=shard, view=view, rows=num_wrong))
