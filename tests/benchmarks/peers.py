"""Whole loaders over the same photographs: processor time per image, summed over all processes of a loader.

Every loader reads, decodes, takes a random resized crop of 224 pixels, flips and batches, with the same batch size and
number of processes. A pass starts new processes and ends when they have ended. The start is measured by passes without
images in the same rounds, and times are given with and without it. Processor time depends less on other programs of the
machine than wall time; the loaders still take turns, and ratios are those of one round.

``webdataset`` decodes with torchvision's operator, ``ImageFolder`` with Pillow from one file per image, both crop with
torchvision. SPDL and ffcv, in ``other_loaders``, are skipped where they are absent. Stillroom additionally reads
teacher outputs and checks every image's hash. With several views an image, each of them counts as an image.
"""

from __future__ import annotations

import io
import resource
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.io
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from pipeline.core.errors import first_line
from pipeline.shards.tar import read_samples
from pipeline.shards.writer import Members, pack_shards
from pipeline.student.data.batch import InputSize
from pipeline.student.data.dataset import StepDataset
from pipeline.student.data.loader import load_batches
from pipeline.student.data.sources import open_cached
from schemas.config import Config, DataConfig
from tests.benchmarks import other_loaders
from tests.benchmarks.join import built, random_teacher
from tests.benchmarks.timing import SHARED, Spread, interleaved, random_resnet, ratio
from tests.pipeline.student.runs import order_of

WORKERS, BATCH, SIZE, EPOCHS, ROUNDS = 2, 32, 224, 16, 7
BASELINE = "webdataset + torchvision"
_SHARDS, _ROWS_A_SHARD = 4, 64
_QUALITY = 88
"""Of generated photographs, whose mean is then 107 kB."""
Drain = Callable[[int], int]
"""Reads all batches of so many epochs; returns the number of images."""


def run() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = photographs(folder)
        peers = _peers(shards, folder)
        for peer, drain in peers.items():
            expected = len(shards) * _ROWS_A_SHARD
            assert (got := drain(1)) == expected, f"{peer} read {got} of {expected} images"
        passes = {(peer, epochs): partial(drain, epochs) for peer, drain in peers.items() for epochs in (0, EPOCHS)}
        seconds = interleaved(passes, rounds=ROUNDS, clock=cpu_seconds)
    num_images = len(shards) * _ROWS_A_SHARD * EPOCHS
    print(f"  {num_images} images a pass, batches of {BATCH}, {WORKERS} processes, {SIZE} pixels")
    for peer in peers:
        _report(peer, seconds, num_images)


def _report(peer: str, seconds: dict[tuple[str, int], list[float]], num_images: int) -> None:
    start, whole, base = seconds[peer, 0], seconds[peer, EPOCHS], seconds[BASELINE, EPOCHS]
    reading, base_reading = _without(start, whole), _without(seconds[BASELINE, 0], base)
    each, started = ([value / num_images * 1e6 for value in values] for values in (reading, whole))
    print(f"  {peer}")
    print(f"    without start {Spread.of(each)} us an image, time / {BASELINE} {ratio(reading, base_reading)}")
    print(f"    with start    {Spread.of(started)} us an image, time / {BASELINE} {ratio(whole, base)}")
    print(f"    start         {Spread.of([value * 1e3 for value in start])} ms a pass")


def _without(start: list[float], whole: list[float]) -> list[float]:
    return [pass_s - start_s for pass_s, start_s in zip(whole, start, strict=True)]


def cpu_seconds() -> float:
    """Of this process and its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def photographs(folder: Path) -> list[Path]:
    """Shards of ``_ROWS_A_SHARD`` photographs, generated where there are no real ones."""
    found = sorted((SHARED / "imagenet-samples").glob("sample-*.tar"))
    if len(found) == _SHARDS:
        return found
    print(f"  {SHARED / 'imagenet-samples'} is absent: generated photographs")
    rng = np.random.default_rng(0)
    samples: Iterator[tuple[str, Members]] = (
        (f"{number:05d}", {"jpg": _photograph(rng), "cls": b"0"}) for number in range(_SHARDS * _ROWS_A_SHARD)
    )
    return [Path(url) for url in pack_shards(samples, f"{folder}/sample-%05d.tar", shard_size=_ROWS_A_SHARD)]


def _photograph(rng: np.random.Generator) -> bytes:
    """500 x 375 pixels whose amplitudes fall with 1 / frequency, as those of photographs do."""
    frequency = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500))
    frequency[0, 0] = 1
    noise = (np.fft.irfft2(np.fft.rfft2(rng.standard_normal((375, 500))) / frequency, s=(375, 500)) for _ in range(3))
    luma, red, blue = (plane / plane.std() for plane in noise)
    pixels_HWC = np.stack([luma + 0.4 * red, luma, luma + 0.4 * blue], axis=-1)
    buffer = io.BytesIO()
    Image.fromarray((128 + 50 * pixels_HWC).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def _peers(shards: list[Path], folder: Path) -> dict[str, Drain]:
    files = image_files(shards, folder / "images")
    peers = {
        BASELINE: _webdataset(shards),
        "Pillow + ImageFolder": _image_folder(folder / "images"),
        "Stillroom": _stillroom(shards, folder / "cache"),
        "Stillroom, 4 views an image": _stillroom(shards, folder / "views", views_per_image=4),
        "Stillroom, stored views": _stillroom(shards, folder / "stored", pixels="jpeg:90"),
    }
    others: dict[str, Callable[[], Drain]] = {
        "SPDL": partial(other_loaders.spdl, shards, batch=BATCH, size=SIZE, threads=WORKERS),
        "ffcv": partial(other_loaders.ffcv, files, folder / "images.beton", batch=BATCH, size=SIZE, threads=WORKERS),
    }
    for name, build in others.items():
        try:
            peers[name] = build()
        except ImportError as error:
            print(f"  {name} skipped, not installed: {first_line(error)}")
    return peers


def image_files(shards: list[Path], folder: Path) -> list[Path]:
    """Writes each image of the shards to a file, in a folder of its class."""
    files: list[Path] = []
    for path in shards:
        for sample in read_samples(path, DataConfig.model_validate({"num_classes": 1000}), where=str(path)):
            target = folder / str(sample.target) / f"{path.stem}-{sample.key}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(sample.data)
            files.append(target)
    return files


def _crop() -> list[Any]:
    return [v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()]


def _webdataset(shards: list[Path]) -> Drain:
    library: Any = import_module("webdataset")
    transform = v2.Compose(_crop())

    def view(data: bytes) -> Tensor:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return transform(torchvision.io.decode_image(encoded, torchvision.io.ImageReadMode.RGB))

    def drain(epochs: int) -> int:
        samples = library.WebDataset([str(path) for path in shards], shardshuffle=_SHARDS)
        samples = samples.shuffle(_ROWS_A_SHARD).to_tuple("jpg", "cls").map_tuple(view, int)
        # No number of epochs means no end to ``repeat``.
        samples = samples.repeat(epochs) if epochs else samples.slice(0)
        loader: Any = DataLoader(samples.batched(BATCH), batch_size=None, num_workers=WORKERS)
        return sum(len(pixels) for pixels, _ in loader)

    return drain


def _image_folder(folder: Path) -> Drain:
    dataset = ImageFolder(str(folder), v2.Compose([*_crop(), v2.PILToTensor()]))

    def drain(epochs: int) -> int:
        order = [index for _ in range(epochs) for index in torch.randperm(len(dataset)).tolist()]
        loader: Any = DataLoader(dataset, BATCH, sampler=order, num_workers=WORKERS)
        return sum(len(pixels) for pixels, _ in loader)

    return drain


def _stillroom(shards: list[Path], url: Path, *, pixels: str = "none", views_per_image: int = 1) -> Drain:
    """From a cache of as many views with 1000 classes."""
    tree = random_teacher("fp16").model_dump(mode="json", exclude_unset=True)
    sections = {
        # Narrow: what the outputs are makes no difference, and the build takes seconds.
        "teacher": random_resnet(kwargs={"depth": 8, "widths": [4, 4, 4, 8]}),
        "data": {"shards": [str(path) for path in shards], "num_classes": 1000},
        "views": {"kind": "crop", "count": views_per_image, "size": SIZE, "area": [0.08, 1.0], "pixels": pixels},
        "cache": {"url": str(url), "logits": "fp16"},
    }
    config = Config.model_validate({**tree, **sections})
    source = open_cached([built(config)], config.data, reads={"logits": (1.0,)})
    dataset = StepDataset(
        source,
        order_of(source, config.views, global_batch_size=BATCH, views_per_image=views_per_image),
        rank=0,
        world_size=1,
        student=InputSize(SIZE, "bilinear"),
        max_pixels=config.data.max_pixels,
    )

    def drain(epochs: int) -> int:
        steps = range(epochs * len(shards) * _ROWS_A_SHARD // BATCH)
        return sum(batch.num_rows for batch in load_batches(dataset, steps, num_workers=WORKERS, pin_memory=False))

    return drain
