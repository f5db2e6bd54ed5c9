"""What Ray adds to a part: tiny parts as tasks against the plain loop, and the driver's memory over 10,000 of them."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence

import psutil
import ray
from PIL import Image

from jobs.build_cache import plan_tasks
from jobs.ray.fan_out import fan_out
from pipeline import storage
from pipeline.cache.build.context import prepare
from pipeline.cache.build.part import PartTask, build_part
from pipeline.shards.shard_urls import shard_ids
from pipeline.shards.writer import pack_shards
from schemas.config import Config
from tests.benchmarks.timing import Spread, interleaved, random_resnet

PARTS = 10_000
_TIMED = 500


def _config(folder: str, name: str, address: str) -> Config:
    """A cache of one image, one view a part, one small network: a part costs little more than its bookkeeping."""
    return Config.model_validate(
        {
            "data": {"shards": f"{folder}/one-0.tar", "num_classes": 10},
            "teacher": random_resnet(batch_size=1),
            "views": {"kind": "crop", "count": PARTS, "size": 8},
            "cache": {"url": f"{folder}/{name}", "views_per_part": 1},
            "ray": {"address": address},
        }
    )


def _tasks(config: Config) -> list[PartTask]:
    assert config.data.shards is not None
    urls = storage.expand(config.data.shards)
    return plan_tasks(config, dict(zip(shard_ids(urls), urls, strict=True)), [])


def run() -> None:
    with tempfile.TemporaryDirectory() as folder:
        image = io.BytesIO()
        Image.new("RGB", (8, 8), (10, 20, 30)).save(image, "PNG")
        pack_shards([("0", {"png": image.getvalue(), "cls": b"1"})], f"{folder}/one-%d.tar", shard_size=1)
        # One slot, so that both ways work on one part at a time.
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
        try:
            _report(_config(folder, "loop", "none"), _config(folder, "ray", "local"))
        finally:
            ray.shutdown()


def _report(loop: Config, through_ray: Config) -> None:
    tasks = {config.ray.address: iter(_tasks(config)) for config in (loop, through_ray)}

    def next_parts(config: Config) -> None:
        parts = [next(tasks[config.ray.address]) for _ in range(_TIMED)]
        list(fan_out(build_part, parts, config.ray, what="a cache task"))

    for config in (loop, through_ray):
        list(fan_out(prepare, [config], config.ray, what="a cache task"))
    rounds = 5
    seconds = interleaved({"loop": lambda: next_parts(loop), "ray": lambda: next_parts(through_ray)}, rounds=rounds)
    per_part = {name: [value / _TIMED * 1e3 for value in values] for name, values in seconds.items()}
    for name, values in per_part.items():
        print(f"  {name:<6}{Spread.of(values)} ms a part")
    added = [a - b for a, b in zip(per_part["ray"], per_part["loop"], strict=True)]
    print(f"  Ray adds {Spread.of(added)} ms a part, over {rounds} x {_TIMED} parts")
    rss = _driver_rss(through_ray, list(tasks["local"]), done=(rounds + 1) * _TIMED)
    print(f"  the driver's memory: {', '.join(f'{size / 1e6:.0f} MB at {count} parts' for count, size in rss.items())}")


def _driver_rss(config: Config, tasks: Sequence[PartTask], *, done: int) -> dict[int, int]:
    """Resident bytes of this process by number of parts done."""
    process = psutil.Process()
    rss = {done: process.memory_info().rss}
    for count, _ in enumerate(fan_out(build_part, tasks, config.ray, what="a cache task"), start=done + 1):
        if count % 1_000 == 0:
            rss[count] = process.memory_info().rss
    return rss
