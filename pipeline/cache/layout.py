"""Where each file of a cache lies. The only place that spells these paths."""

from __future__ import annotations

import re

from pipeline.shards.publish import index_name
from schemas.manifest import ViewBlock

HEADER = "header.json"
INDEX = "index"
MANIFEST = "manifest.json"
SHARDS = "manifest/shards.parquet"
PARTS = "manifest/parts.parquet"
CLASS_MEANS = "class_means.parquet"

_COMMIT = re.compile(r"commits/(?P<shard>.+)/(?P<block>eval|v\d{4,}-\d{4,})\.json")


def index_path(shard_id: str) -> str:
    return f"{INDEX}/{index_name(shard_id)}"


def part_path(shard_id: str, block: ViewBlock) -> str:
    """Where a part goes, with ``{sha16}`` for the first 16 hex characters of its content's SHA-256."""
    return f"parts/{shard_id}/{block.name}.{{sha16}}.parquet"


def means_path(shard_id: str, block: ViewBlock) -> str:
    """Where a block's class sums go; named like a part."""
    return f"means/{shard_id}/{block.name}.{{sha16}}.parquet"


def commit_path(shard_id: str, block: ViewBlock) -> str:
    return f"commits/{shard_id}/{block.name}.json"


def is_commit(path: str) -> bool:
    return _COMMIT.fullmatch(path) is not None
