"""CPU time and bytes of a stored view of 224 pixels, against decode and crop of the photograph; PSNR of its pixels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import xxhash
from torch import Tensor

from pipeline.augment.params import sample_views
from pipeline.augment.pixels import apply_view
from pipeline.augment.stored_pixels import decode_view, encode_jpeg
from pipeline.shards.decode import decode
from pipeline.shards.tar import read_samples
from schemas.config import DataConfig, ViewsConfig
from tests.benchmarks.timing import SHARED, Spread, interleaved, ratio

SIZE, ROUNDS, MAX_PIXELS, PHOTOGRAPHS = 224, 9, 10**8, 200
BASE = "decode and crop"


def run() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images = _images()
    crops = [_crop_of(number, data) for number, data in enumerate(images)]
    views = [crop() for crop in crops]
    stored = {f"jpeg:{quality}": [encode_jpeg(view, quality) for view in views] for quality in (90, 95)}
    stored["raw"] = [view.permute(1, 2, 0).numpy().tobytes() for view in views]
    variants: dict[str, Callable[[], object]] = {BASE: lambda: [crop() for crop in crops]}
    variants |= {f"read {pixels}": _reader(pixels, data) for pixels, data in stored.items()}
    variants["build jpeg:90"] = lambda: [decode_view(encode_jpeg(view, 90), pixels="jpeg", size=SIZE) for view in views]
    seconds = interleaved(variants, rounds=ROUNDS, clock=time.thread_time)
    torch.set_num_threads(threads)
    print(f"  {len(images)} photographs of {statistics.mean(map(len, images)):.0f} bytes")
    for pixels, data in stored.items():
        print(f"  {pixels:<16}{statistics.mean(map(len, data)):.0f} bytes, PSNR {_psnr(pixels, data, views):.1f} dB")
    for name, values in seconds.items():
        each = Spread.of([value / len(images) * 1e6 for value in values])
        print(f"  {name:<16}{each} us per view, {ratio(values, seconds[BASE])} of {BASE}")


def _images() -> list[bytes]:
    shards = sorted((SHARED / "imagenet-samples").glob("sample-*.tar"))
    data = DataConfig.model_validate({})
    return [sample.data for shard in shards for sample in read_samples(shard, data, where=str(shard))][:PHOTOGRAPHS]


def _crop_of(number: int, data: bytes) -> Callable[[], Tensor]:
    height, width = decode(data, max_pixels=MAX_PIXELS).shape[1:]
    sides = (np.array([side], np.int32) for side in (width, height))
    params = sample_views(ViewsConfig.model_validate({}), [f"photograph/{number}"], 0, *sides)
    box, flip = params.box_N4[0].tolist(), bool(params.flip_N[0])
    return lambda: apply_view(decode(data, max_pixels=MAX_PIXELS), box, flip, size=SIZE, interpolation="bilinear")


def _reader(pixels: str, stored: list[bytes]) -> Callable[[], object]:
    """As a loader process reads them: hash and decode."""

    def read() -> None:
        for data in stored:
            xxhash.xxh3_64_intdigest(data)
            decode_view(data, pixels=pixels, size=SIZE)

    return read


def _psnr(pixels: str, stored: list[bytes], views: list[Tensor]) -> float:
    """Mean over the views; infinite for equal pixels."""
    decoded = [decode_view(data, pixels=pixels, size=SIZE).double() for data in stored]
    errors = [float(((own - view) ** 2).mean()) for own, view in zip(decoded, views, strict=True)]
    return statistics.mean(10 * np.log10(255**2 / error) if error else np.inf for error in errors)
