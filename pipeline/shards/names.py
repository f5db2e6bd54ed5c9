"""What a shard is called: its file stem, which has to tell it from every other shard."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.core.errors import ShardError
from pipeline.core.redaction import redact


def shard_id(url: str) -> str:
    """``train-00012`` for ``s3://bucket/train-00012.tar?versionId=…``.

    Raises:
        ShardError: the file is not called ``<stem>.tar``. A compressed tar has no byte ranges to read samples by.
    """
    name = redact(url).rsplit("/", 1)[-1]
    stem = name.removesuffix(".tar")
    if stem == name or stem in {"", ".", ".."}:
        raise ShardError(
            "this is not the name of a shard",
            code="shard.name",
            where=redact(url),
            got=repr(name),
            expected="<name>.tar, not compressed",
            next_step="unpack a compressed tar (gunzip, zstd -d): samples are read by byte range",
        )
    return stem


def shard_ids(urls: Iterable[str]) -> list[str]:
    """The id of every URL, in order.

    Raises:
        ShardError: a name is refused by ``shard_id``, or two URLs share one.
    """
    seen: dict[str, str] = {}
    for url in urls:
        name = shard_id(url)
        if name in seen:
            raise ShardError(
                f"two shards are called {name!r}",
                code="shard.same-name",
                where=redact(url),
                got=f"also {redact(seen[name])}",
                expected="a file stem of its own for every shard: sample ids begin with it",
                next_step="rename one, or list it once",
            )
        seen[name] = url
    return list(seen)
