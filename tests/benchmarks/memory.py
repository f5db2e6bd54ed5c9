"""Peak memory of a task for a shard of 1,000 images and for one of 10,000, each in a new process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.cache.build.context import prepare
from pipeline.cache.build.part import PartTask, build_part
from pipeline.shards.tar import read_samples
from pipeline.shards.writer import Members, pack_shards
from schemas.cache_format import ViewBlock
from schemas.config import Config, DataConfig
from tests.benchmarks.timing import SHARED, Spread, random_resnet, ratio

SIZES, ROUNDS = (1_000, 10_000), 3
VIEWS = 2
# So many classes that already the smaller shard fills a row group of 32 MiB; the larger one's rows are 655 MB.
NUM_CLASSES = 8_192


def _config(shard: str, url: str) -> Config:
    return Config.model_validate(
        {
            "data": {"shards": shard, "num_classes": NUM_CLASSES},
            "teacher": random_resnet(),
            "views": {"kind": "function_matching", "count": VIEWS, "size": 32},
            "cache": {"url": url, "logits": "fp32", "views_per_part": VIEWS},
            "ray": {"address": "none"},
        }
    )


def _images() -> Iterator[tuple[str, Members]]:
    """CIFAR-10's training images, shard after shard, with unique keys."""
    data = DataConfig.model_validate({})
    for path in sorted((SHARED / "cifar10").glob("train-*.tar")):
        for sample in read_samples(path, data, where=str(path)):
            yield f"{path.stem}-{sample.key}", {"jpg": sample.data, "cls": str(sample.target).encode()}


def run() -> None:
    with tempfile.TemporaryDirectory() as folder:
        shards = {size: pack_shards(_images(), f"{folder}/of-{size}-%02d.tar", shard_size=size)[0] for size in SIZES}
        peaks: dict[int, list[float]] = {size: [] for size in SIZES}
        for number in range(ROUNDS):
            for size, shard in shards.items():
                peaks[size].append(_in_a_process(shard, f"{folder}/cache-{size}-{number}"))
    for size, values in peaks.items():
        print(f"  a shard of {size:>6} images, {VIEWS} views: {Spread.of(values)} MB above a loaded teacher")
    print(f"  {SIZES[1]} / {SIZES[0]}: {ratio(peaks[SIZES[1]], peaks[SIZES[0]])}")


def _in_a_process(shard: str, cache_url: str) -> float:
    command = [sys.executable, "-m", "tests.benchmarks.memory", shard, cache_url]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _peak_of_a_part(shard: str, cache_url: str) -> float:
    """Peak MB (10⁶ bytes) of building one part, above those of a process with its teacher."""
    config = _config(shard, cache_url)
    prepare(config)
    before_bytes = _status_bytes("VmRSS")
    # Resets the high-water mark (Linux).
    Path("/proc/self/clear_refs").write_text("5")
    build_part(PartTask(config, shard, ViewBlock(start=0, stop=VIEWS)))
    return (_status_bytes("VmHWM") - before_bytes) / 1e6


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(value) * 1024


if __name__ == "__main__":
    print(json.dumps(_peak_of_a_part(*sys.argv[1:])))
