"""The small shards, configs and caches of the other tests."""

from __future__ import annotations

from tests.jobs.conftest import document, ray_cluster, shards, tree
from tests.pipeline.conftest import built_cache, digits_shards, tiny_cache

__all__ = ["built_cache", "digits_shards", "document", "ray_cluster", "shards", "tiny_cache", "tree"]
