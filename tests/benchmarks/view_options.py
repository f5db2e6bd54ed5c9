"""Cost of each option of a plan for a view of 224 pixels of a 500 x 375 photograph, without decoding and cropping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.augment.options import aug_params_row, cutmix_boxes
from pipeline.augment.params import ViewParams, sample_keys, view_params
from pipeline.augment.pixels import apply_view, stack_views, to_input
from pipeline.shards.decode import decode, image_size
from pipeline.shards.tar import read_samples
from schemas.config import DataConfig, ViewsConfig
from tests.benchmarks.timing import SHARED, Spread, interleaved, ratio

VIEWS, SIZE, ROUNDS = 64, 224, 9
PLANS: dict[str, dict[str, Any]] = {
    "crop and flip": {},
    "jitter": {"jitter": {}},
    "jitter with hue": {"jitter": {"hue": 0.1}},
    "randaugment": {"randaugment": {}},
    "erasing": {"erasing": {"probability": 1.0}},
    "all of these": {"jitter": {"hue": 0.1}, "randaugment": {}, "erasing": {"probability": 1.0}},
}


def _photograph() -> bytes:
    shard = SHARED / "imagenet-samples" / "sample-00000.tar"
    samples = read_samples(shard, DataConfig.model_validate({}), where=str(shard))
    return next(sample.data for sample in samples if sample.status == "ok" and image_size(sample.data) == (500, 375))


def _params(**options: Any) -> ViewParams:
    plan = ViewsConfig.model_validate({"kind": "function_matching", **options})
    keys = np.repeat(sample_keys(0, ["photograph"]), VIEWS, axis=0)
    return view_params(plan, keys, np.arange(VIEWS), np.full(VIEWS, 500), np.full(VIEWS, 375))


def _rendering(image: Tensor, params: ViewParams) -> Callable[[], list[Tensor]]:
    boxes, flips = params.box_N4.tolist(), params.flip_N.tolist()
    return lambda: [
        apply_view(
            image, boxes[row], flips[row], aug_params_row(params.aug_params, row), size=SIZE, interpolation="bicubic"
        )
        for row in range(VIEWS)
    ]


def _mixing(pixels: Tensor, params: ViewParams) -> Callable[[], Tensor]:
    boxes = cutmix_boxes(params.aug_params)
    cut = None if boxes is None else torch.from_numpy(boxes)
    partner, own, zero = torch.arange(VIEWS).flip(0), torch.from_numpy(params.mix_lambda_N), torch.zeros(3)
    return lambda: to_input(pixels, mean_C=zero, std_C=zero + 1, partner_B=partner, lambda_B=own, cutmix_box_B4=cut)


def run() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data = _photograph()
    image = decode(data, max_pixels=10**6)
    variants: dict[str, Callable[[], object]] = {"decode": lambda: decode(data, max_pixels=10**6)}
    variants |= {name: _rendering(image, _params(**options)) for name, options in PLANS.items()}
    pixels = stack_views(_rendering(image, _params())())
    variants |= {"input, blends": _mixing(pixels, _params()), "input, boxes": _mixing(pixels, _params(cutmix=1.0))}
    seconds = interleaved(variants, rounds=ROUNDS)
    torch.set_num_threads(threads)
    seconds["decode"] = [value * VIEWS for value in seconds["decode"]]
    for name, values in seconds.items():
        reported = f"  {name:<17}{Spread.of([value / VIEWS * 1e6 for value in values])} µs a view"
        base = {"decode": None, "input, boxes": "input, blends"}.get(name, "crop and flip")
        print(reported + (f", {ratio(values, seconds[base])} of {base}" if base and base != name else ""))
