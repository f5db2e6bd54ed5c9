"""Small caches for tests, built by a plain loop."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from pipeline import storage
from pipeline.cache.build.blocks import BlockPlan
from pipeline.cache.build.commit import stream_commits
from pipeline.cache.build.context import prepare
from pipeline.cache.build.manifest import publish_manifest
from pipeline.cache.build.part import PartTask, build_part
from pipeline.cache.read.reader import TeacherCache, open_cache
from pipeline.shards.shard_urls import shard_ids
from pipeline.shards.writer import Members
from schemas.cache_format import Commit, Manifest
from schemas.config import CacheConfig, Config


def digit_samples(count: int) -> Iterator[tuple[str, Members]]:
    """Handwritten digits on coloured backgrounds, in different sizes, so that a mixed-up axis is noticed."""
    digits, random = load_digits(), np.random.default_rng(0)
    for row in range(count):
        ink = np.kron(digits.images[row] / 16, np.ones((3, 3)))
        background, stroke = random.uniform(0, 255, (2, 3))
        pixels = (background + (stroke - background) * ink[:, :, None]).astype(np.uint8)
        image = Image.fromarray(pixels).resize((17 + row % 7, 23 - row % 5))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        yield f"digit-{row:04d}", {"png": buffer.getvalue(), "cls": str(digits.target[row]).encode()}


@dataclass(frozen=True, slots=True)
class TinyCache:
    """A finished cache, and the config that built it."""

    url: str
    config: Config


def cache_section(config: Config) -> CacheConfig:
    assert config.cache is not None
    return config.cache


def shard_urls(config: Config) -> dict[str, str]:
    """Shard id to URL."""
    assert config.data.shards is not None
    urls = [storage.absolute(url) for url in storage.expand(config.data.shards)]
    return dict(zip(shard_ids(urls), urls, strict=True))


def read_commits(url: str) -> list[Commit]:
    """Every commit of a cache of few shards, by path."""
    return [*stream_commits(url)]


def open_tasks(config: Config) -> list[PartTask]:
    """The parts that no commit names."""
    cache, urls = cache_section(config), shard_urls(config)
    missing = BlockPlan.of(config).missing_by_shard(
        urls, ((commit.shard_id, commit.block) for commit in read_commits(cache.url)), cache_url=cache.url
    )
    return [PartTask(config, urls[shard], block) for shard, blocks in missing.items() for block in blocks]


def build(config: Config, tasks: Iterable[PartTask] | None = None) -> Manifest:
    """Claims the cache, builds the open parts (or ``tasks``, in this order), publishes the manifest."""
    prepare(config)
    for task in open_tasks(config) if tasks is None else tasks:
        build_part(task)
    return publish_manifest(cache_section(config).url, shard_urls(config))


def open_built(config: Config) -> TeacherCache:
    """Builds a cache and opens it."""
    build(config)
    return open_cache(cache_section(config).url)


def copy_of(cache: TinyCache, folder: Path) -> TinyCache:
    """A copy of the cache, which a test may change."""
    shutil.copytree(cache.url, folder)
    section = cache_section(cache.config).model_copy(update={"url": str(folder)})
    return TinyCache(str(folder), cache.config.model_copy(update={"cache": section}))


def files(url: str) -> dict[str, bytes]:
    """Every file of a cache by relative path, except those of ``log/``."""
    paths = (path for path in storage.listing(url) if not path.startswith("log/"))
    return {path: storage.read(storage.join(url, path)) for path in paths}
