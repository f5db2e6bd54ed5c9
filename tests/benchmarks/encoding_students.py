"""Students of each encoding at equal bytes: trained on stored logits of the teacher of 1000 pseudo-classes.

A ResNet-8, which sees crops at half their size, learns from ``kd`` at T = 1 alone, on half of the CIFAR-10 images. All
students of a seed have the same initial weights and the same batches, and differ in the encoding only. They are
compared with the teacher on other crops of images that they have not seen: the share of crops where both predict the
same class, the calibration error under labels that the teacher's probabilities draw (0 for a student with its
probabilities), and the KL divergence.

A training takes about a minute. Its figures are stored in ``runs/bench/encoding_students``, so a call that is stopped
continues. ``replace`` is sampling with replacement (Sparse Logit Sampling, ACL 2025), granted the best code of sorted
ids in the bytes of ``sampled:17@1``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import avg_pool2d

from pipeline.augment.pixels import apply_view, to_input
from pipeline.cache.format.codec import RowIdentity, decode, encode, row_bytes, stored_outputs
from pipeline.cache.read.reader import TeacherCache
from pipeline.core.significance import seed_interval
from pipeline.models.cifar import resnet
from pipeline.shards.decode import decode as decode_image
from pipeline.shards.tar import read_samples
from pipeline.student.losses.kd import kd
from pipeline.tasks import OutputSpec
from schemas.config import DataConfig
from tests.benchmarks.teachers import BENCH, INPUT, BenchTeacher, stored_crops, thousand_classes
from tests.benchmarks.timing import CIFAR

NUM_CLASSES, BATCH, LR, WARMUP_STEPS, ECE_BINS = 1000, 125, 0.004, 40, 15
EVAL_VIEWS, EVAL_SEED = 4, 1
"""Of the images for evaluation."""
BASELINE, REPLACE = "fp32", "replace"
_ABSENT = -1000.0
_MEAN_C, _STD_C = (torch.tensor(INPUT[name]) for name in ("mean", "std"))

Matrix = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Series:
    """Students of some views of the images of the first shards.

    Attributes:
        seeds: number of seeds by encoding.
    """

    num_views: int
    num_shards: int
    epochs: int
    seeds: dict[str, int]


SERIES = (
    Series(
        num_views=10,
        num_shards=5,
        epochs=20,
        seeds={
            BASELINE: 20,
            "sampled:17@1": 20,
            "topk:16": 10,
            REPLACE: 10,
            "sampled:40@1": 10,
            "topk:39": 10,
            "sampled:87@1": 10,
            "topk:86": 10,
        },
    ),
    Series(num_views=50, num_shards=2, epochs=50, seeds={BASELINE: 6, "sampled:17@1": 6, "topk:16": 6, REPLACE: 6}),
)


@dataclass(frozen=True, slots=True)
class Crops:
    """Crops of images and what the teacher predicts for them: ids of N rows, uint8 [V,N,3,32,32], fp32 [V,N,K]."""

    sample_ids: list[str]
    pixels_VNCHW: Tensor
    logits_VNK: Matrix

    @classmethod
    def read(cls, cache: TeacherCache, num_views: int) -> Crops:
        sample_ids: list[str] = []
        pixels: list[list[Tensor]] = [[] for _ in range(num_views)]
        logits: list[list[Matrix]] = [[] for _ in range(num_views)]
        for shard in cache.shards:
            samples = list(read_samples(Path(cache.shard_url(shard)), DataConfig(), where=shard.shard_id))
            images = [decode_image(sample.data, max_pixels=10_000) for sample in samples]
            sample_ids += [f"{shard.shard_id}/{sample.key}" for sample in samples]
            for view in range(num_views):
                columns = cache.view(shard.shard_id, view)
                logits[view].append(columns.decoded("logits"))
                boxes, flips = columns.box_N4.tolist(), columns.flip_N.tolist()
                pixels[view] += [
                    apply_view(image, box, flip, size=32, interpolation="bilinear")
                    for image, box, flip in zip(images, boxes, flips, strict=True)
                ]
        views = torch.stack([torch.stack(view) for view in pixels])
        return cls(sample_ids, views, np.stack([np.concatenate(view) for view in logits]))


def run() -> None:
    teacher = thousand_classes()
    held_out = [
        _crops(teacher, name, shards, EVAL_VIEWS, seed=EVAL_SEED)
        for name, shards in (("rest", "train-{00005..00009}.tar"), ("val", "val-{00000..00001}.tar"))
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for series in SERIES:
        name, shards = f"{series.num_views}-views", f"train-{{00000..{series.num_shards - 1:05}}}.tar"
        figures = _train_missing(series, _crops(teacher, name, shards, series.num_views), held_out)
        _print_table(series, figures)
    torch.set_num_threads(threads)


def _crops(teacher: BenchTeacher, name: str, shards: str, num_views: int, *, seed: int = 0) -> Crops:
    return Crops.read(stored_crops(teacher, f"students-{name}", CIFAR / shards, num_views, seed=seed), num_views)


def _train_missing(series: Series, train: Crops, held_out: Sequence[Crops]) -> dict[str, dict[int, dict[str, float]]]:
    """Figures by encoding and seed, of all trainings of a series."""
    path = BENCH / "encoding_students" / f"{series.num_views}-views.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    figures: dict[str, dict[int, dict[str, float]]] = {kind: {} for kind in series.seeds}
    for line in path.read_text().splitlines() if path.exists() else []:
        entry = json.loads(line)
        figures[entry["kind"]][entry["seed"]] = entry
    # By seed, so that a series that is stopped has pairs of all encodings.
    for seed in range(max(series.seeds.values())):
        for kind, num_seeds in series.seeds.items():
            if seed < num_seeds and seed not in figures[kind]:
                measured = _measure(_trained(series, train, kind, seed), held_out)
                figures[kind][seed] = measured
                with path.open("a") as file:
                    file.write(json.dumps({"kind": kind, "seed": seed, **measured}) + "\n")
    return figures


def _targets(kind: str, crops: Crops, view: int) -> Matrix:
    """fp32 [N,K]: the logits of a view, as ``kd`` at T = 1 sees them."""
    logits_NK = crops.logits_VNK[view]
    if kind == BASELINE:
        return logits_NK
    if kind == REPLACE:
        return _drawn_with_replacement(logits_NK, _num_draws(_num_bytes("sampled:17@1")), view)
    (output,) = stored_outputs([OutputSpec("logits", (NUM_CLASSES,), kind)])
    rows = RowIdentity(crops.sample_ids, view)
    return decode(encode(logits_NK, output, identity=rows), output, temperature=1.0)


def _num_bytes(kind: str) -> int:
    if kind == REPLACE:
        kind = "sampled:17@1"
    (output,) = stored_outputs([OutputSpec("logits", (NUM_CLASSES,), kind)])
    return row_bytes(output)


def _num_draws(num_bytes: int) -> int:
    """How many sorted ids fit: an Elias-Fano code takes b + 1 bits for each, and K / 2^b for all."""
    return max((8 * num_bytes - ((NUM_CLASSES - 1) >> bits)) // (bits + 1) for bits in range(10))


def _drawn_with_replacement(logits_NK: Matrix, num_draws: int, view: int) -> Matrix:
    p_NK = np.exp(logits_NK.astype(np.float64) - logits_NK.max(1, keepdims=True))
    p_NK /= p_NK.sum(1, keepdims=True)
    counts_NK = np.random.default_rng(view).multinomial(num_draws, p_NK)
    return np.where(counts_NK > 0, np.log(np.maximum(counts_NK, 1) / num_draws), _ABSENT).astype(np.float32)


def _trained(series: Series, crops: Crops, kind: str, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    network = resnet(NUM_CLASSES, depth=8).to(memory_format=torch.channels_last).train()
    num_steps = series.epochs * math.ceil(len(crops.sample_ids) / BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(1, step / num_steps))),
    )
    crops = Crops(
        crops.sample_ids, crops.pixels_VNCHW[:, : len(crops.sample_ids)], crops.logits_VNK[:, : len(crops.sample_ids)]
    )
    for epoch in range(series.epochs):
        view = epoch % series.num_views
        targets_NK = torch.from_numpy(_targets(kind, crops, view))
        for rows_B in torch.from_numpy(rng.permutation(len(crops.sample_ids))).split(BATCH):
            optimizer.zero_grad()
            logits_BK = _forward(network, crops.pixels_VNCHW[view, rows_B])
            kd(logits_BK, targets_NK[rows_B], temperature=1.0).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def _forward(network: torch.nn.Module, pixels_BCHW: Tensor) -> Tensor:
    pixels = pixels_BCHW.contiguous(memory_format=torch.channels_last)
    return network(avg_pool2d(to_input(pixels, mean_C=_MEAN_C, std_C=_STD_C), 2))


@torch.inference_mode()
def _measure(network: torch.nn.Module, held_out: Sequence[Crops]) -> dict[str, float]:
    """Agreement and calibration error as shares, KL divergence from the teacher in nats."""
    num_rows, agreement, kl = 0, 0.0, 0.0
    bins_3E = np.zeros((2, ECE_BINS))
    for crops in held_out:
        for view in range(EVAL_VIEWS):
            for pixels, logits in zip(
                crops.pixels_VNCHW[view].split(500), torch.from_numpy(crops.logits_VNK[view]).split(500), strict=True
            ):
                student_log_BK = _forward(network, pixels).double().log_softmax(1)
                teacher_log_BK = logits.double().log_softmax(1)
                confidence_B, class_B = student_log_BK.exp().max(1)
                expected_B = teacher_log_BK.exp().gather(1, class_B[:, None])[:, 0]
                num_rows += len(class_B)
                agreement += (class_B == teacher_log_BK.argmax(1)).sum().item()
                kl += (teacher_log_BK.exp() * (teacher_log_BK - student_log_BK)).sum().item()
                bin_B = np.minimum((confidence_B.numpy() * ECE_BINS).astype(int), ECE_BINS - 1)
                np.add.at(bins_3E[0], bin_B, confidence_B.numpy())
                np.add.at(bins_3E[1], bin_B, expected_B.numpy())
    ece = np.abs(bins_3E[0] - bins_3E[1]).sum() / num_rows
    return {"agreement": agreement / num_rows, "ece": float(ece), "kl": kl / num_rows}


def _print_table(series: Series, figures: dict[str, dict[int, dict[str, float]]]) -> None:
    print(f"  {series.num_views} views of {series.num_shards},000 images, {series.epochs} epochs; ± 95 % over seeds")
    baseline = figures[BASELINE]
    for kind, by_seed in figures.items():
        cells = [f"{kind:<14}{_num_bytes(kind):>6} bytes, {len(by_seed)} seeds"]
        for name, factor in (("agreement", 100), ("ece", 100), ("kl", 1)):
            values = [
                factor * (entry[name] - (0 if kind == BASELINE else baseline[seed][name]))
                for seed, entry in by_seed.items()
            ]
            interval = seed_interval(values)
            sign = "" if kind == BASELINE else "+"
            cells.append(f"{name} {interval.mean:{sign}.3f} ± {interval.half_width:.3f}")
        print("    " + "; ".join(cells), flush=True)
