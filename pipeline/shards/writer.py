"""Writes samples into shards with the same bytes on every machine: no header has a clock, user or host."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from itertools import chain, count, islice
from pathlib import Path

from webdataset.writer import TarWriter

from pipeline.core.errors import ShardError
from pipeline.core.redaction import redact
from pipeline.shards.members import split_name
from pipeline.shards.shard_urls import shard_id
from pipeline.storage import put

Members = Mapping[str, bytes]


def pack_shards(samples: Iterable[tuple[str, Members]], pattern: str, *, shard_size: int) -> list[str]:
    """Writes ``(key, {extension: bytes})`` samples, in order, into shards of ``shard_size`` samples.

    Args:
        pattern: URL of the shards with one printf number, such as ``out/train-%05d.tar``.

    Returns:
        The shards' URLs, in order. Each appears complete or not at all.

    Raises:
        ShardError: the pattern does not number shards, or a member's name would be read back as another key.
    """
    base, slash, name = pattern.rpartition("/")
    _check_pattern(name, pattern)
    stream, urls = iter(samples), list[str]()
    for number in count():
        first = next(stream, None)
        if first is None:
            return urls
        url = base + slash + name % number
        write_shard(chain([first], islice(stream, shard_size - 1)), url)
        urls.append(url)
    raise AssertionError("count() has no end")


def write_shard(samples: Iterable[tuple[str, Members]], url: str) -> None:
    """Writes one shard, which appears complete or not at all, with one sample in memory at a time.

    Raises:
        ShardError: a member's name would be read back as another key.
    """
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "shard.tar"
        with TarWriter(str(local), encoder=False, user="", group="", mode=0o644, mtime=0) as writer:
            for key, members in samples:
                for extension in members:
                    check_name(key, extension)
                writer.write({"__key__": key, **members})
        put(local, url)


def _check_pattern(name: str, pattern: str) -> None:
    try:
        distinct = shard_id(name % 0) != shard_id(name % 1)
    except (TypeError, ValueError):
        distinct = False
    if not distinct:
        raise ShardError(
            "this pattern does not number the shards",
            code="shard.pattern-without-number",
            where=redact(pattern),
            expected="one printf number, as in %05d",
        )


def check_name(key: str, extension: str) -> None:
    """
    Raises:
        ShardError: a reader would split the name into another key and extension.
    """
    name = f"{key}.{extension}"
    if split_name(name) != (key, extension):
        raise ShardError(
            "this member's name would be read back as another key",
            code="shard.member-name",
            where=repr(name),
            got=split_name(name),
            expected="no dot in the last part of the key, a lower-case extension, no __metadata__ folder",
        )
