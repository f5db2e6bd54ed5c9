"""Digits with labels of three heads, some of them missing, and caches of a teacher with these heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.shards.writer import pack_shards
from schemas.config import Config, ViewsConfig
from tests.pipeline.caches import TinyCache, build, cache_section, digit_samples

HEADS = {"pair": {"num_classes": 10}, "even": {"num_classes": 2}, "tags": {"num_classes": 11, "kind": "multilabel"}}
DATA = {"task": "heads", "label": "json", "num_classes": None, "heads": HEADS}


def document_of(row: int) -> dict[str, Any]:
    """Of an image: each third has no pair and each fifth no tags."""
    document: dict[str, Any] = {"pair": row % 10, "even": row % 2, "tags": [row % 11, (row + 1) % 11]}
    return {name: label for name, label in document.items() if not (name == "pair" and row % 3 == 0)} | (
        {"tags": None} if row % 5 == 0 else {}
    )


def pack_heads(folder: Path, *, num_images: int = 30, stem: str = "heads") -> list[str]:
    """The URLs of shards of 20 images."""
    samples = [
        (key, {"png": members["png"], "json": json.dumps(document_of(row)).encode()})
        for row, (key, members) in enumerate(digit_samples(num_images))
    ]
    return pack_shards(samples, f"{folder}/{stem}-%d.tar", shard_size=20)


def heads_config(base: Config, folder: Path, *, views: dict[str, Any], **cache: Any) -> Config:
    """``base`` with shards of these digits, which are written to the folder, and the key ``cache.url`` in it."""
    tree = base.model_dump(mode="json", exclude_unset=True)
    tree["data"] = {**tree["data"], **DATA, "shards": pack_heads(folder)}
    tree["cache"] = {**tree["cache"], "url": f"{folder}/cache", **cache}
    tree["views"] = ViewsConfig.model_validate({**tree["views"], **views}).model_dump(mode="json", exclude_unset=True)
    return Config.model_validate(tree)


def build_heads(config: Config) -> TinyCache:
    build(config)
    return TinyCache(cache_section(config).url, config)
