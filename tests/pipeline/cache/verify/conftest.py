"""A cache with each kind of file: class sums, two shards and blocks, an extension, a skipped sample, two moments."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cache.ops.moments import compute_moments
from pipeline.shards.writer import pack_shards
from tests.pipeline.caches import TinyCache, build, copy_of, digit_samples
from tests.pipeline.conftest import tiny_config_of


@pytest.fixture(scope="session")
def grown_cache(tmp_path_factory: pytest.TempPathFactory) -> TinyCache:
    """Three views, then two more; ``digit-0004`` cannot be decoded. Tests only read it."""
    folder = tmp_path_factory.mktemp("grown")
    samples = dict(digit_samples(35))
    samples["digit-0004"] = {**samples["digit-0004"], "png": b"no image"}
    shards = pack_shards(samples.items(), f"{folder}/digits-%02d.tar", shard_size=20)
    for count in (3, 5):
        overrides = {"data": {"shards": shards, "bad_samples": "skip"}, "views": {"count": count}}
        config = tiny_config_of(shards, f"{folder}/cache", overrides)
        build(config)
        compute_moments(f"{folder}/cache")
    return TinyCache(f"{folder}/cache", config)


@pytest.fixture
def cache(grown_cache: TinyCache, tmp_path: Path) -> TinyCache:
    """A copy that the test may change."""
    return copy_of(grown_cache, tmp_path / "cache")
