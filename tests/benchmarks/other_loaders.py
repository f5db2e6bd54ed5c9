"""SPDL and ffcv over photographs, for ``peers``. Both decode in threads of one process.

Neither is a dependency of the project: SPDL needs the libraries of FFmpeg, ffcv a compiler, OpenCV and libturbojpeg.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from pipeline.shards.tar import read_samples
from schemas.config import DataConfig

Drain = Callable[[int], int]
_AREA, _ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)


def spdl(shards: list[Path], *, batch: int, size: int, threads: int) -> Drain:
    """FFmpeg decodes, crops, resizes and flips.

    Raises:
        ImportError: SPDL or FFmpeg is absent.
    """
    io, pipeline = import_module("spdl.io"), import_module("spdl.pipeline")
    try:
        import_module("spdl.io.utils").get_ffmpeg_versions()
    except RuntimeError as error:
        raise ImportError(str(error)) from error
    data = DataConfig.model_validate({"num_classes": 1000})

    def encoded(epochs: int) -> Iterator[bytes]:
        for _ in range(epochs):
            for path in random.sample(shards, len(shards)):
                photographs = [sample.data for sample in read_samples(path, data, where=str(path))]
                yield from random.sample(photographs, len(photographs))

    def view(photograph: bytes) -> Any:
        packets = io.demux_image(photograph)
        dimensions = torch.empty((3, packets.height, packets.width), device="meta")
        top, left, height, width = RandomResizedCrop.get_params(dimensions, [*_AREA], [*_ASPECT])
        # swscale's bilinear filter is antialiased.
        filters = f"crop={width}:{height}:{left}:{top},scale={size}:{size}:flags=bilinear"
        flip = ",hflip" if random.random() < 0.5 else ""
        return io.decode_packets(packets, filter_desc=f"{filters}{flip},format=rgb24")

    def drain(epochs: int) -> int:
        builder = pipeline.PipelineBuilder().add_source(encoded(epochs)).pipe(view, concurrency=threads)
        builder = builder.aggregate(batch).pipe(lambda views: io.to_torch(io.convert_frames(views))).add_sink(2)
        with (running := builder.build(num_threads=threads)).auto_stop():
            return sum(len(pixels) for pixels in running)

    return drain


def ffcv(photographs: list[Path], file: Path, *, batch: int, size: int, threads: int) -> Drain:
    """From ffcv's own file, whose writer encodes the photographs again. OpenCV resizes by area.

    Raises:
        ImportError: ffcv is absent.
    """
    fields, loaders, transforms, writer = (
        import_module(f"ffcv.{name}") for name in ("fields", "loader", "transforms", "writer")
    )
    rgb = import_module("ffcv.fields.rgb_image")
    image = fields.RGBImageField(write_mode="jpg", jpeg_quality=90)
    writer.DatasetWriter(str(file), {"image": image}, num_workers=1).from_indexed_dataset(_Images(photographs))
    steps = [rgb.RandomResizedCropRGBImageDecoder((size, size), _AREA, _ASPECT), transforms.RandomHorizontalFlip()]
    # One loader for all passes: it compiles its steps at the first.
    loader = loaders.Loader(
        str(file),
        batch_size=batch,
        num_workers=threads,
        order=loaders.OrderOption.RANDOM,
        pipelines={"image": [*steps, transforms.ToTensor(), transforms.ToTorchImage()]},
    )
    return lambda epochs: sum(len(pixels) for _ in range(epochs) for (pixels,) in loader)


class _Images:
    def __init__(self, photographs: list[Path]) -> None:
        self._photographs = photographs

    def __len__(self) -> int:
        return len(self._photographs)

    def __getitem__(self, index: int) -> tuple[Image.Image]:
        return (Image.open(self._photographs[index]).convert("RGB"),)
