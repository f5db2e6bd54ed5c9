"""A cache build in one process against the sum of what it cannot avoid: bare decode, bare views, bare forward."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from pipeline.cache.build import PartTask, build_part, prepare
from pipeline.shards.decode import decode
from pipeline.shards.tar import read_samples
from pipeline.teacher.infer import Teacher, load_teacher
from pipeline.views.params import sample_keys, view_params
from pipeline.views.pixels import apply_view, stack_views
from schemas.config import Config
from schemas.manifest import ViewBlock
from tests.benchmarks.timing import SHARED, Spread, interleaved, ratio

THREADS, VIEWS = 2, 4
CASES = {
    "imagenet-samples, ResNet-50, 224, bf16": (
        SHARED / "imagenet-samples" / "sample-00000.tar",
        {"model": "timm/resnet50", "precision": "bf16", "batch_size": 64},
        {"size": 224},
        1000,
        3,
    ),
    "cifar10, ResNet-20, 32, bf16": (
        SHARED / "cifar10" / "train-00000.tar",
        {
            "model": "python:pipeline.models.cifar:resnet",
            "kwargs": {"depth": 20},
            "mean": (0.5, 0.5, 0.5),
            "std": (0.25, 0.25, 0.25),
            "precision": "bf16",
            "batch_size": 128,
        },
        {"size": 32},
        10,
        5,
    ),
}


def _config(shard: Path, teacher: dict[str, object], views: dict[str, object], num_classes: int, url: str) -> Config:
    return Config.model_validate(
        {
            "data": {"shards": str(shard), "num_classes": num_classes},
            "teacher": teacher,
            "views": {"kind": "crop", "count": VIEWS, **views},
            "cache": {"url": url, "views_per_part": VIEWS},
            "ray": {"address": "none", "cpus_per_task": THREADS},
        }
    )


class _Bare:
    """The parts by themselves, on the same rows and threads, everything in memory."""

    def __init__(self, config: Config, shard: Path) -> None:
        self.config = config
        self.samples = list(read_samples(shard, config.data, where=str(shard)))
        self.images = self.decode()
        self.views = self.render()
        self.num_rows = len(self.samples) * VIEWS
        assert config.data.num_classes is not None
        self.teacher: Teacher = load_teacher(
            config.teacher,
            num_classes=config.data.num_classes,
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
        for view in range(VIEWS):
            drawn = view_params(self.config.views, keys, np.full(len(keys), view, np.int64), widths, heights)
            rendered += self._map(self._apply, self.images, drawn.box_N4.tolist(), drawn.flip_N.tolist())
        return rendered

    def _apply(self, image: torch.Tensor, box: list[int], flip: bool) -> torch.Tensor:
        assert self.config.views.size is not None
        return apply_view(image, box, flip, size=self.config.views.size, interpolation="bicubic")

    def forward(self) -> None:
        pixels = stack_views(self.views)
        for start in range(0, len(pixels), 256):
            self.teacher.answer(pixels[start : start + 256])


def run() -> None:
    for title, (shard, teacher, views, num_classes, rounds) in CASES.items():
        if not shard.exists():
            print(f"  {title}: skipped, {shard} is absent")
            continue
        with tempfile.TemporaryDirectory() as folder:
            _report(title, _config(shard, teacher, views, num_classes, folder + "/cache"), shard, Path(folder), rounds)


def _report(title: str, config: Config, shard: Path, folder: Path, rounds: int) -> None:
    torch.set_num_threads(THREADS)
    bare = _Bare(config, shard)

    def build() -> None:
        # The same config each time, so that the teacher stays loaded: start-up is not part of the number.
        shutil.rmtree(folder / "cache", ignore_errors=True)
        build_part(PartTask(config, str(shard), ViewBlock(start=0, stop=VIEWS)))

    prepare(config)
    parts = {"decode": bare.decode, "views": bare.render, "forward": bare.forward, "build": build}
    seconds = interleaved(parts, rounds=rounds)
    print(f"  {title}: {bare.num_rows} rows, {VIEWS} views an image")
    for name, values in seconds.items():
        print(f"    {name:<8}{Spread.of([value / bare.num_rows * 1e3 for value in values])} ms a row")
    limits = [sum(seconds[part][number] for part in ("decode", "views", "forward")) for number in range(rounds)]
    print(f"    throughput / limit: {ratio(limits, seconds['build'])}")
