"""A whole cache build, in one process and through Ray, against what it cannot avoid: decode, views, forward."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from jobs.build_cache import build_cache
from jobs.ray.cluster import cluster
from jobs.ray.fan_out import fan_out
from pipeline import storage
from pipeline.augment.params import sample_keys, view_params
from pipeline.augment.pixels import apply_view, stack_views
from pipeline.cache.build.context import prepare
from pipeline.cache.build.part import PartBuild
from pipeline.cache.build.part_writer import PartWriter
from pipeline.cache.build.statistics import StatisticsSum
from pipeline.shards.decode import decode
from pipeline.shards.tar import read_samples
from pipeline.teacher.inference import Teacher, load_teacher
from schemas.config import Config
from tests.benchmarks.timing import SHARED, Spread, Stopwatch, interleaved, random_resnet, ratio

THREADS = 2
# The work from teacher outputs to a committed part: all of a build except reading, decoding, views and the teacher.
STORING = (
    (PartBuild, "record_batch"),
    (StatisticsSum, "add"),
    (PartWriter, "add"),
    (PartWriter, "close"),
    (PartBuild, "publish"),
)


@dataclass(frozen=True, slots=True)
class _Case:
    """One teacher on some real shards."""

    shards: str
    teacher: dict[str, object]
    size: int
    num_classes: int
    views: int
    rounds: int

    def config(self, folder: str) -> Config:
        return Config.model_validate(
            {
                "data": {"shards": str(SHARED / self.shards), "num_classes": self.num_classes},
                "teacher": self.teacher,
                "views": {"kind": "crop", "count": self.views, "size": self.size},
                "cache": {"url": f"{folder}/cache", "views_per_part": self.views},
                "ray": {"address": "none", "cpus_per_task": THREADS},
            }
        )


CASES = {
    "imagenet-samples, ResNet-50, 224, bf16": _Case(
        shards="imagenet-samples/sample-{00000..00003}.tar",
        teacher={"model": "timm/resnet50", "weights": "random", "precision": "bf16", "batch_size": 64},
        size=224,
        num_classes=1000,
        views=8,
        rounds=7,
    ),
    "cifar10, ResNet-20, 32, bf16": _Case(
        shards="cifar10/val-00000.tar",
        teacher=random_resnet(20, precision="bf16", batch_size=128),
        size=32,
        num_classes=10,
        views=4,
        rounds=5,
    ),
}


class _Bare:
    """The parts by themselves, on the same rows and threads, everything in memory."""

    def __init__(self, config: Config) -> None:
        assert config.data.shards is not None
        assert config.data.num_classes is not None
        self.config = config
        urls = storage.expand(config.data.shards)
        self.samples = [sample for url in urls for sample in read_samples(Path(url), config.data, where=url)]
        self.num_rows = len(self.samples) * config.views.count
        self.images = self.decode()
        self.views = self.render()
        self.teacher: Teacher = load_teacher(
            config.teacher,
            widths={"logits": config.data.num_classes},
            size=config.views.size,
            device=torch.device("cpu"),
        )

    def _map(self, work: Callable[..., torch.Tensor], *columns: list[object]) -> list[torch.Tensor]:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(work, *columns))

    def decode(self) -> list[torch.Tensor]:
        return self._map(lambda sample: decode(sample.data, max_pixels=64_000_000), self.samples)

    def render(self) -> list[torch.Tensor]:
        keys = sample_keys(0, [sample.key for sample in self.samples])
        widths, heights = (np.array([image.shape[axis] for image in self.images], np.int64) for axis in (2, 1))
        rendered: list[torch.Tensor] = []
        for view in range(self.config.views.count):
            sampled = view_params(self.config.views, keys, np.full(len(keys), view, np.int64), widths, heights)
            rendered += self._map(self._apply, self.images, sampled.box_N4.tolist(), sampled.flip_N.tolist())
        return rendered

    def _apply(self, image: torch.Tensor, box: list[int], flip: bool) -> torch.Tensor:
        assert self.config.views.size is not None
        return apply_view(image, box, flip, size=self.config.views.size, interpolation="bicubic")

    def forward(self) -> None:
        for start in range(0, len(self.views), 256):
            self.teacher.infer(stack_views(self.views[start : start + 256]))


def run() -> None:
    for title, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            _report(title, case.config(folder), case.rounds)


def _report(title: str, config: Config, rounds: int) -> None:
    torch.set_num_threads(THREADS)
    bare = _Bare(config)
    ray_config = config.model_copy(update={"ray": config.ray.model_copy(update={"address": "local"})})
    stored = Stopwatch()
    with cluster(ray_config.ray):
        # Start-up: loading the teacher, in this process and in a worker. The same config each time keeps both loaded.
        start_up = {name: _seconds(partial(_start_up, each)) for name, each in _ways(config, ray_config)}
        with stored.on(STORING):
            seconds = interleaved(
                {
                    "decode": bare.decode,
                    "views": bare.render,
                    "forward": bare.forward,
                    **{name: partial(_build, each) for name, each in _ways(config, ray_config)},
                },
                rounds=rounds,
            )
    per_row = {name: [value / bare.num_rows * 1e3 for value in values] for name, values in seconds.items()}
    # An image is decoded once for all its views.
    print(f"  {title}: {bare.num_rows} rows, {config.views.count} views an image")
    for name, values in per_row.items():
        print(f"    {name:<24}{Spread.of(values)} ms a row")
    limits = [sum(parts) for parts in zip(*(seconds[part] for part in ("decode", "views", "forward")), strict=True)]
    for name, _ in _ways(config, ray_config):
        print(f"    throughput / limit, {name}: {ratio(limits, seconds[name])}; start-up {start_up[name]:.1f} s apart")
    # The stopwatch also saw the round that is not counted.
    share = stored.seconds / (rounds + 1) / statistics.median(seconds["one process"])
    print(f"    encoding, statistics, Parquet, hashing and publishing: {share:.2%} of the build in one process")


def _ways(config: Config, ray_config: Config) -> list[tuple[str, Config]]:
    return [("one process", config), ("through Ray", ray_config)]


def _start_up(config: Config) -> None:
    list(fan_out(prepare, [config], config.ray, what="a cache task"))


def _build(config: Config) -> None:
    assert config.cache is not None
    shutil.rmtree(config.cache.url)
    build_cache(config)


def _seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
