"""Whole loaders over the same photographs: processor time per image, summed over all processes of a loader.

Every loader reads, decodes, takes a random resized crop of 224 pixels, flips and batches, with the same batch size and
number of processes. A pass starts new processes and ends when they have ended. Processor time depends less on other
programs of the machine than wall time; the loaders still take turns, and ratios are those of one round.

``webdataset`` decodes with torchvision's operator, ``ImageFolder`` with Pillow from one file per image, both crop with
torchvision. Stillroom additionally reads teacher outputs and checks every image's hash.
"""

from __future__ import annotations

import io
import resource
import tempfile
import warnings
from collections.abc import Callable, Iterator
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

from pipeline.shards.tar import read_samples
from pipeline.shards.writer import Members, pack_shards
from pipeline.student.data.batch import InputSize
from pipeline.student.data.dataset import StepDataset
from pipeline.student.data.loader import load_batches
from pipeline.student.data.sources import open_cached
from schemas.config import Config, DataConfig
from tests.benchmarks.join import built, random_teacher
from tests.benchmarks.timing import SHARED, Spread, interleaved, random_resnet, ratio
from tests.pipeline.student.runs import order_of

WORKERS, BATCH, SIZE, EPOCHS, ROUNDS = 2, 32, 224, 8, 7
BASELINE = "webdataset + torchvision"
_SHARDS, _ROWS_A_SHARD = 4, 64
_QUALITY = 88
"""Of generated photographs, whose mean is then 107 kB."""
Drain = Callable[[], int]
"""Reads all batches of a pass; returns the number of images."""


def run() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = photographs(folder)
        peers = _peers(shards, folder)
        expected = len(shards) * _ROWS_A_SHARD * EPOCHS
        for peer, drain in peers.items():
            assert (got := drain()) == expected, f"{peer} read {got} of {expected} images"
        seconds = interleaved(peers, rounds=ROUNDS, clock=cpu_seconds)
    print(f"  {expected} images a pass, batches of {BATCH}, {WORKERS} processes, {SIZE} pixels")
    for peer, values in seconds.items():
        each = Spread.of([value / expected * 1e6 for value in values])
        print(f"  {peer:<26}{each} us an image, time / {BASELINE} {ratio(values, seconds[BASELINE])}")


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
    return {
        BASELINE: _webdataset(shards),
        "Pillow + ImageFolder": _image_folder(shards, folder / "images"),
        "Stillroom": _stillroom(shards, folder / "cache"),
        "Stillroom, stored views": _stillroom(shards, folder / "stored", pixels="jpeg:90"),
    }


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

    def drain() -> int:
        samples = library.WebDataset([str(path) for path in shards], shardshuffle=_SHARDS)
        samples = samples.shuffle(_ROWS_A_SHARD).to_tuple("jpg", "cls").map_tuple(view, int)
        loader: Any = DataLoader(samples.repeat(EPOCHS).batched(BATCH), batch_size=None, num_workers=WORKERS)
        return sum(len(pixels) for pixels, _ in loader)

    return drain


def _image_folder(shards: list[Path], folder: Path) -> Drain:
    for path in shards:
        for sample in read_samples(path, DataConfig.model_validate({"num_classes": 1000}), where=str(path)):
            target = folder / str(sample.target) / f"{path.stem}-{sample.key}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(sample.data)
    dataset = ImageFolder(str(folder), v2.Compose([*_crop(), v2.PILToTensor()]))

    def drain() -> int:
        loader: Any = DataLoader(dataset, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)
        return sum(len(pixels) for _ in range(EPOCHS) for pixels, _ in loader)

    return drain


def _stillroom(shards: list[Path], url: Path, *, pixels: str = "none") -> Drain:
    """From a cache of one view with 1000 classes."""
    tree = random_teacher("fp16").model_dump(mode="json", exclude_unset=True)
    sections = {
        # Narrow: what the outputs are makes no difference, and the build takes seconds.
        "teacher": random_resnet(kwargs={"depth": 8, "widths": [4, 4, 4, 8]}),
        "data": {"shards": [str(path) for path in shards], "num_classes": 1000},
        "views": {"kind": "crop", "count": 1, "size": SIZE, "area": [0.08, 1.0], "pixels": pixels},
        "cache": {"url": str(url), "logits": "fp16"},
    }
    config = Config.model_validate({**tree, **sections})
    source = open_cached([built(config)], config.data, reads={"logits": (1.0,)})
    dataset = StepDataset(
        source,
        order_of(source, config.views, global_batch_size=BATCH),
        rank=0,
        world_size=1,
        student=InputSize(SIZE, "bilinear"),
        max_pixels=config.data.max_pixels,
    )

    def drain() -> int:
        steps = range(EPOCHS * dataset.order.num_steps)
        return sum(batch.num_rows for batch in load_batches(dataset, steps, num_workers=WORKERS, pin_memory=False))

    return drain
