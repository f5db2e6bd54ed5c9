"""What a JPEG of a view changes for a trained network: 256 photographs as 256 classes, five trainings.

Nothing but these photographs can be assumed, so a network learns to tell them apart from random crops of 224 pixels.
Then it sees other crops, each as it is and as ``views.pixels: jpeg:Q`` stores it. About two minutes per training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional

from pipeline.augment.params import sample_views
from pipeline.augment.pixels import to_input
from pipeline.augment.stored_pixels import render_view
from pipeline.core.significance import seed_interval
from pipeline.shards.decode import decode
from pipeline.shards.tar import read_samples
from schemas.config import DataConfig, ViewsConfig
from tests.benchmarks.timing import SHARED

SEEDS, EPOCHS, EVAL_VIEWS, SIZE, BATCH, LR = 5, 80, 8, 224, 32, 0.004
QUALITIES = (None, 95, 90)
_MEAN_C, _STD_C = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
_FIRST_EVAL_VIEW, _VIEWS_A_SEED, _WARMUP_STEPS, _MAX_PIXELS = 10**6, 1000, 40, 10**8


@dataclass(frozen=True, slots=True)
class Photographs:
    """Decoded images, and the plan of their crops."""

    images: list[Tensor]
    plan: ViewsConfig

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, view: int, order: Sequence[int], quality: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs [B,3,S,S] and numbers [B] of the photographs in this order, as one view shows them."""
        heights, widths = np.array([image.shape[1:] for image in self.images], np.int32).T
        params = sample_views(self.plan, [f"photograph/{number}" for number in range(len(self))], view, widths, heights)
        boxes, flips = params.box_N4.tolist(), params.flip_N.tolist()
        render = partial(render_view, quality=quality, size=SIZE, interpolation="bilinear", fill=self.plan.fill)
        for first in range(0, len(order), BATCH):
            chosen = list(order[first : first + BATCH])
            views = [render(self.images[number], boxes[number], flips[number])[0] for number in chosen]
            pixels = to_input(torch.stack(views), mean_C=_MEAN_C, std_C=_STD_C)
            yield pixels.contiguous(memory_format=torch.channels_last), torch.tensor(chosen)


def run() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shards = sorted((SHARED / "imagenet-samples").glob("sample-*.tar"))
    data = DataConfig.model_validate({})
    samples = (sample for shard in shards for sample in read_samples(shard, data, where=str(shard)))
    plan = ViewsConfig.model_validate({"kind": "crop", "area": [0.25, 1.0], "size": SIZE})
    photographs = Photographs([decode(sample.data, max_pixels=_MAX_PIXELS) for sample in samples], plan)
    trainings = [_measure(_trained(photographs, seed), photographs) for seed in range(SEEDS)]
    torch.set_num_threads(threads)
    print(f"  {len(photographs)} photographs as classes, {EVAL_VIEWS} other views of each; {SEEDS} trainings")
    for quality in QUALITIES:
        values = ([training[quality][index] for training in trainings] for index in range(3))
        top1, agreement, kl = map(seed_interval, values)
        print(
            f"  {'as they are' if quality is None else f'jpeg:{quality}':<12} "
            f"top-1 {100 * top1.mean:.2f} ± {100 * top1.half_width:.2f} %, "
            f"agreement {100 * agreement.mean:.2f} ± {100 * agreement.half_width:.2f} %, "
            f"KL {kl.mean:.4f} ± {kl.half_width:.4f} nats"
        )
    for quality in QUALITIES[1:]:
        change = seed_interval([100 * (training[quality][0] - training[None][0]) for training in trainings])
        print(f"  jpeg:{quality} - as they are: top-1 {change.mean:.2f} ± {change.half_width:.2f}, paired by seed")


def _trained(photographs: Photographs, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    network = timm.create_model("mobilenetv3_small_050", num_classes=len(photographs))
    network = network.to(memory_format=torch.channels_last).train()
    num_steps = EPOCHS * math.ceil(len(photographs) / BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / _WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(1, step / num_steps))),
    )
    for epoch in range(EPOCHS):
        order = rng.permutation(len(photographs)).tolist()
        for pixels_BCHW, target_B in photographs.batches(_VIEWS_A_SEED * seed + epoch, order, None):
            optimizer.zero_grad()
            functional.cross_entropy(network(pixels_BCHW), target_B).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@torch.inference_mode()
def _measure(network: nn.Module, photographs: Photographs) -> dict[int | None, tuple[float, float, float]]:
    """Top-1, agreement with the class of the view as it is, and KL divergence from its probabilities in nats."""
    order = range(len(photographs))
    target_N = torch.arange(len(photographs)).repeat(EVAL_VIEWS)
    logits = {
        quality: torch.cat(
            [
                network(pixels_BCHW).double().log_softmax(1)
                for view in range(_FIRST_EVAL_VIEW, _FIRST_EVAL_VIEW + EVAL_VIEWS)
                for pixels_BCHW, _ in photographs.batches(view, order, quality)
            ]
        )
        for quality in QUALITIES
    }
    exact_NK = logits[None]
    return {
        quality: (
            (log_NK.argmax(1) == target_N).double().mean().item(),
            (log_NK.argmax(1) == exact_NK.argmax(1)).double().mean().item(),
            (exact_NK.exp() * (exact_NK - log_NK)).sum(1).mean().item(),
        )
        for quality, log_NK in logits.items()
    }
