"""The path of each file of a cache. No other module contains these paths."""

from __future__ import annotations

import re

from pipeline.shards.publish import index_name
from schemas.cache_format import ViewBlock

HEADER = "header.json"
INDEX = "index"
LOG = "log"
MANIFEST = "manifest.json"
SHARDS = "manifest/shards.parquet"
PARTS = "manifest/parts.parquet"
CLASS_MEANS = "class_means.parquet"
IMPORTED_MEANS = "class_means.json"
HEAD = "head.safetensors"
FORMER = "manifest/former/"
RELABELLED = "labels/"
MOMENTS = "moments/"

_BLOCK = r"(?:eval|v(?P<first>\d{4,})-(?P<last>\d{4,}))"
_COMMIT = re.compile(rf"commits/(?P<shard>[^/]+)/{_BLOCK}\.json")
_INDEX = re.compile(rf"{INDEX}/[^/]+\.parquet")
_MOMENTS = re.compile(rf"{MOMENTS}(?P<manifest>[0-9a-f]{{16}})(\.json|\.[0-9a-f]{{16}}\.parquet)")
_NAMED_BY_CONTENT = re.compile(rf"(?:parts|means)/(?P<shard>[^/]+)/{_BLOCK}\.[0-9a-f]{{16}}\.parquet")


def index_path(shard_id: str) -> str:
    return f"{INDEX}/{index_name(shard_id)}"


def relabelled_path(shard_id: str, sha256: str) -> str:
    """An index with labels that were read again after the build, named by its content."""
    return f"{RELABELLED}{shard_id}.{sha256[:16]}.parquet"


def part_path(shard_id: str, block: ViewBlock) -> str:
    """The path of a part, with ``{sha16}`` for the first 16 hex characters of its SHA-256."""
    return f"parts/{shard_id}/{block.name}.{{sha16}}.parquet"


def means_path(shard_id: str, block: ViewBlock) -> str:
    """The path of a block's class sums, named like a part."""
    return f"means/{shard_id}/{block.name}.{{sha16}}.parquet"


def commit_path(shard_id: str, block: ViewBlock) -> str:
    return f"commits/{shard_id}/{block.name}.json"


def former_path(sha256: str) -> str:
    """The path of a table or of class means that an extended cache has replaced, for runs that still name them."""
    return f"{FORMER}{sha256}.parquet"


def moments_path(manifest_sha256: str) -> str:
    """The record of the moments of the state of a cache that this manifest describes."""
    return f"{MOMENTS}{manifest_sha256[:16]}.json"


def moments_table_path(manifest_sha256: str, sha256: str) -> str:
    """The numbers that such a record names."""
    return f"{MOMENTS}{manifest_sha256[:16]}.{sha256[:16]}.parquet"


def moments_manifest(path: str) -> str | None:
    """The first 16 hex characters of the manifest's SHA-256, for a file of ``moments/``; None for any other file."""
    match = _MOMENTS.fullmatch(path)
    return None if match is None else match["manifest"]


def is_moments_record(path: str) -> bool:
    return moments_manifest(path) is not None and path.endswith(".json")


def is_commit(path: str) -> bool:
    return _COMMIT.fullmatch(path) is not None


def is_index(path: str) -> bool:
    return _INDEX.fullmatch(path) is not None


def owner(path: str) -> tuple[str, ViewBlock] | None:
    """The shard and block of a file of ``parts/`` or ``means/``; None for a file with any other name."""
    match = _NAMED_BY_CONTENT.fullmatch(path)
    if match is None:
        return None
    if match["first"] is None:
        return match["shard"], ViewBlock(start=0, stop=1, is_eval=True)
    return match["shard"], ViewBlock(start=int(match["first"]), stop=int(match["last"]) + 1)
