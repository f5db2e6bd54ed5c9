"""A whole build over two nodes of one CPU each against one of them."""

from __future__ import annotations

import itertools
import logging
import tempfile

import ray

from jobs.build_cache import build_cache
from pipeline.shards.writer import pack_shards
from schemas.config import Config
from tests.benchmarks.timing import Spread, interleaved, random_resnet, ratio
from tests.jobs.clusters import driver, many_nodes
from tests.pipeline.caches import digit_samples

_SHARDS, _IMAGES, _VIEWS, _ROUNDS = 8, 64, 12, 5


def _config(folder: str, name: str, nodes: str) -> Config:
    """A cache whose parts run where the resource of that name is."""
    return Config.model_validate(
        {
            "data": {"shards": f"{folder}/digits-{{00..{_SHARDS - 1:02d}}}.tar", "num_classes": 10},
            "teacher": random_resnet(20, batch_size=32),
            "views": {"kind": "crop", "count": _VIEWS, "size": 32},
            "cache": {"url": f"{folder}/{name}", "views_per_part": 2},
            "ray": {"address": "auto", "resources_per_task": {nodes: 0.01}},
        }
    )


def run() -> None:
    sizes = {"resources": {"one": 1, "both": 1}}, {"resources": {"both": 1}}
    with tempfile.TemporaryDirectory() as folder, many_nodes(*sizes) as (nodes, _), driver() as pool:
        pack_shards(digit_samples(_SHARDS * _IMAGES), f"{folder}/digits-%02d.tar", shard_size=_IMAGES)
        print(pool.submit(_measure, folder, nodes.address).result())


def _measure(folder: str, address: str) -> str:
    # One job for all builds, so that workers keep their teacher from one to the next.
    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    names = map(str, itertools.count())
    seconds = interleaved(
        {
            "one node": lambda: build_cache(_config(folder, next(names), "one")),
            "two nodes": lambda: build_cache(_config(folder, next(names), "both")),
        },
        rounds=_ROUNDS,
    )
    num_views = _SHARDS * _IMAGES * _VIEWS
    rates = {name: Spread.of([num_views / value for value in values]) for name, values in seconds.items()}
    lines = [f"  {name:<10}{rate} views/s" for name, rate in rates.items()]
    return "\n".join([*lines, f"  seconds on one / on two: {ratio(seconds['one node'], seconds['two nodes'])}"])
