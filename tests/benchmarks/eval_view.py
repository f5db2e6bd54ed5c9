"""Our eval view (box, then resize) against timm's eval transform (resize the shorter edge, then crop the centre)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from pipeline.augment.params import eval_params
from pipeline.augment.pixels import apply_view, stack_views
from pipeline.shards.decode import decode
from pipeline.shards.tar import Sample, read_samples
from pipeline.teacher.inference import Teacher, load_teacher
from schemas.config import DataConfig, TeacherConfig, ViewsConfig
from tests.benchmarks.teachers import ten_classes
from tests.benchmarks.timing import CIFAR, SHARED, Spread

PHOTOGRAPHS = SHARED / "imagenet-samples"


def run() -> None:
    small = _load({**ten_classes().section, "batch_size": 128}, num_classes=10, size=32)
    for fraction in (1.0, 0.875):
        _report(f"CIFAR-10, ResNet-20, crop fraction {fraction}", small, sorted(CIFAR.glob("val-*.tar")), fraction)
    # No weights of an ImageNet network are available: this compares pixels and the cosine of logits.
    large = _load({"model": "timm/resnet50", "weights": "random", "batch_size": 64}, num_classes=1000, size=224)
    for fraction in (0.875, 0.95):
        title = f"photographs, ResNet-50 with random weights, crop fraction {fraction}"
        _report(title, large, sorted(PHOTOGRAPHS.glob("*.tar"))[:1], fraction)


def _load(section: dict[str, Any], *, num_classes: int, size: int) -> Teacher:
    config = TeacherConfig.model_validate(section)
    return load_teacher(config, widths={"logits": num_classes}, size=size, device=torch.device("cpu"))


def _report(title: str, teacher: Teacher, shards: list[Path], fraction: float) -> None:
    samples = [sample for shard in shards for sample in read_samples(shard, DataConfig(), where=shard.name)]
    ours, theirs = stack_views(list(_our_views(samples, teacher, fraction))), _timm_views(samples, teacher, fraction)
    logits = [teacher.infer(pixels)["logits"] for pixels in (ours, theirs)]
    label_N = np.array([sample.target for sample in samples])
    print(f"  {title}: {len(samples)} images")
    apart = (ours.int() - theirs.int()).abs()
    each = Spread.of(apart.float().mean((1, 2, 3)).tolist())
    print(f"    pixels differ by {each} on average, by {int(apart.max())} at most")
    chosen_N, other_N = (of.argmax(1) for of in logits)
    right_N, other_right_N = chosen_N == label_N, other_N == label_N
    agreement = (chosen_N == other_N).mean()
    print(f"    cosine of the logits {Spread.of(_cosines(*logits).tolist())}; the same class for {agreement:.2%}")
    print(
        f"    top-1 {right_N.mean():.2%} under ours, {other_right_N.mean():.2%} under timm's; right under one alone: "
        f"{(right_N & ~other_right_N).sum()} ours, {(other_right_N & ~right_N).sum()} timm's"
    )


def _our_views(samples: list[Sample], teacher: Teacher, fraction: float) -> Iterator[Tensor]:
    spec, plan = teacher.loaded.input, ViewsConfig(kind="eval", crop_fraction=fraction)
    for sample in samples:
        image_CHW = decode(sample.data, max_pixels=64_000_000)
        sides = (np.array([image_CHW.shape[axis]]) for axis in (2, 1))
        box = eval_params(plan, *sides).box_N4[0].tolist()
        yield apply_view(image_CHW, box, False, size=spec.size, interpolation=spec.interpolation)


def _timm_views(samples: list[Sample], teacher: Teacher, fraction: float) -> Tensor:
    """The pixels before timm normalises them."""
    spec = teacher.loaded.input
    transform: Any = create_transform(
        (3, spec.size, spec.size), crop_pct=fraction, interpolation=spec.interpolation, use_prefetcher=True
    )
    images = (decode(sample.data, max_pixels=64_000_000).permute(1, 2, 0).numpy() for sample in samples)
    return torch.from_numpy(np.stack([transform(Image.fromarray(image)) for image in images]))


def _cosines(one_NK: NDArray[np.float32], other_NK: NDArray[np.float32]) -> NDArray[np.float32]:
    centred = [logits_NK - logits_NK.mean(1, keepdims=True) for logits_NK in (one_NK, other_NK)]
    norms = np.linalg.norm(centred[0], axis=1) * np.linalg.norm(centred[1], axis=1)
    return (centred[0] * centred[1]).sum(1) / norms
