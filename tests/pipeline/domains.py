"""Digits of three cameras, some of them of none, and caches of a teacher of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.shards.writer import pack_shards
from schemas.config import Config
from tests.pipeline.caches import digit_samples

CAMERAS = ("east", "north", "a/b: 50 %")


def camera_of(row: int) -> str | None:
    """Of an image: each fifth has none."""
    return None if row % 5 == 0 else CAMERAS[row % 3]


def pack_cameras(folder: Path, *, num_images: int = 30, stem: str = "cameras") -> list[str]:
    """The URLs of shards of 20 images."""
    samples = [
        (key, {**members, "json": json.dumps({"meta": {"camera": camera_of(row)}}).encode()})
        for row, (key, members) in enumerate(digit_samples(num_images))
    ]
    return pack_shards(samples, f"{folder}/{stem}-%d.tar", shard_size=20)


def cameras_config(base: Config, folder: Path, **sections: Any) -> Config:
    """``base`` with shards of these digits, which are written to the folder, and the key ``cache.url`` in it."""
    tree = base.model_dump(mode="json", exclude_unset=True)
    data = {**tree["data"], "domain": "json:meta.camera", "shards": pack_cameras(folder)}
    tree |= {"data": data, "cache": {**tree["cache"], "url": f"{folder}/cache"}}
    for name, keys in sections.items():
        tree[name] = {**tree.get(name, {}), **keys}
    return Config.model_validate(tree)
