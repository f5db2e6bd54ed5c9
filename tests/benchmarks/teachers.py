"""Two teachers that were really trained, on CIFAR-10 alone, and their fp32 logits over clean and over mixed views.

The first knows the 10 classes. The second knows 1000, since weights of an ImageNet teacher cannot be assumed: crops of
the images are clustered into 1000 pseudo-classes by the first one's embeddings (k-means), and another network is
trained on the pixels of the crops. Its classes have neighbours and distant ones, as dogs and ships are in ImageNet, and
its confidence is learned; its images are small. Everything is stored in ``runs/bench`` and computed once.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from sklearn.cluster import MiniBatchKMeans
from torch import nn

from jobs.build_cache import build_cache
from jobs.train_student import train_student
from pipeline.augment.pixels import apply_view
from pipeline.cache.read.reader import TeacherCache, open_cache
from pipeline.shards.decode import decode
from pipeline.shards.tar import read_samples
from pipeline.shards.writer import Members, pack_shards
from pipeline.student.run.checkpoint import LAST
from schemas.config import Config, DataConfig
from tests.benchmarks.timing import CIFAR, has_fast_bf16

BENCH = Path(__file__).resolve().parents[2] / "runs" / "bench"
_NUM_PSEUDO = 1000
_CROPS = {"kind": "crop", "size": 32, "area": [0.4, 1.0], "crop_fraction": 1.0}
_VIEWS = {"clean": {"kind": "eval", "size": 32, "crop_fraction": 1.0}, "mixed": {**_CROPS, "kind": "function_matching"}}
INPUT = {"mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.2435, 0.2616]}


@dataclass(frozen=True, slots=True)
class BenchTeacher:
    """A trained network: its name, classes, the section that loads it, and its accuracy."""

    name: str
    num_classes: int
    section: dict[str, Any]
    top1: float

    def logits(self, views: str) -> NDArray[np.float32]:
        """fp32 [N, K] of 2,000 images that it was trained on: ``clean`` (eval views) or ``mixed`` ones."""
        cache = _cache(self, f"{self.name}-{views}", CIFAR / "train-{00000..00001}.tar", _VIEWS[views])
        return np.concatenate([cache.view(shard.shard_id, 0).decoded("logits") for shard in cache.shards])

    def embeddings(self, views: str) -> NDArray[np.float32]:
        """fp32 [N, D] of the same images."""
        name = f"{self.name}-{views}-embeddings"
        cache = _cache(self, name, CIFAR / "train-{00000..00001}.tar", _VIEWS[views], embeddings="fp32")
        return np.concatenate([cache.view(shard.shard_id, 0).decoded("embedding") for shard in cache.shards])


def stored_crops(teacher: BenchTeacher, name: str, shards: Path, num_views: int, *, seed: int = 0) -> TeacherCache:
    """Crops of CIFAR-10 images and the fp32 logits of a teacher for them."""
    return _cache(teacher, f"{teacher.name}-{name}", shards, {**_CROPS, "count": num_views, "seed": seed})


def ten_classes() -> BenchTeacher:
    data = {"shards": f"{CIFAR}/train-{{00000..00009}}.tar", "val_shards": f"{CIFAR}/val-{{00000..00001}}.tar"}
    return _trained("teacher10", {**data, "num_classes": 10}, _CROPS, epochs=8)


def thousand_classes() -> BenchTeacher:
    folder = BENCH / "pseudo"
    if not (folder / "crops-09.tar").exists():
        pack_shards(_pseudo_samples(ten_classes()), f"{folder}/crops-%02d.tar", shard_size=4000)
    # The samples are crops already, so training takes them almost whole.
    views = {**_CROPS, "area": [0.7, 1.0]}
    # The last shard's images are in no other.
    data = {"shards": f"{folder}/crops-{{00..08}}.tar", "val_shards": f"{folder}/crops-09.tar"}
    return _trained(
        "teacher1000", {**data, "num_classes": _NUM_PSEUDO}, views, epochs=3, weights=str(_trunk(ten_classes()))
    )


def _trunk(teacher: BenchTeacher) -> Path:
    """A teacher's weights under a head of 1000 classes: training starts from features that separate the crops."""
    state = torch.load(teacher.section["weights"], weights_only=True)["model"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = nn.Linear(state["fc.weight"].shape[1], _NUM_PSEUDO)
    path = BENCH / "trunk.safetensors"
    state |= {"fc.weight": head.weight.data, "fc.bias": head.bias.data}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def _trained(
    name: str, data: dict[str, Any], views: dict[str, Any], *, epochs: int, weights: str = "random"
) -> BenchTeacher:
    section = {"model": "python:pipeline.models.cifar:resnet", "kwargs": {"depth": 20}, **INPUT}
    run = BENCH / name
    config = Config.model_validate(
        {
            "data": data,
            "teacher": {"mode": "none"},
            "student": {**section, "weights": weights},
            "views": views,
            "loss": [{"name": "ce"}],
            "train": {
                "epochs": epochs,
                "global_batch_size": 128,
                "lr": 0.004,
                "warmup_steps": 200,
                "weight_decay": 0.05,
                "clip_norm": 1.0,
                "precision": "bf16" if has_fast_bf16() else "fp32",
                "eval_every_epochs": 0,
            },
            "run": {"url": str(run)},
            "ray": {"address": "none", "cpus_per_worker": 1},
        }
    )
    summary = train_student(config)
    return BenchTeacher(name, data["num_classes"], {**section, "weights": str(run / LAST)}, summary["top1"])


def _cache(
    teacher: BenchTeacher, name: str, shards: Path, views: dict[str, Any], *, embeddings: str = "none"
) -> TeacherCache:
    config = Config.model_validate(
        {
            # Pseudo-classes are not the labels of these shards.
            "data": {"shards": str(shards), "num_classes": teacher.num_classes, "label": None},
            "teacher": {**teacher.section, "batch_size": 128},
            "views": views,
            "cache": {"url": str(BENCH / name), "logits": "fp32", "embeddings": embeddings},
            "ray": {"address": "none", "cpus_per_task": 2},
        }
    )
    build_cache(config)
    return open_cache(str(BENCH / name))


def _pseudo_samples(teacher: BenchTeacher) -> Iterator[tuple[str, Members]]:
    """Four crops of each image, each labelled with the cluster of its embedding."""
    views = {**_CROPS, "count": 4}
    cache = _cache(teacher, "crops", CIFAR / "train-{00000..00009}.tar", views, embeddings="fp32")
    columns = [(shard, cache.view(shard.shard_id, view)) for shard in cache.shards for view in range(4)]
    embeddings = np.concatenate([column.decoded("embedding") for _, column in columns])
    clusters = MiniBatchKMeans(_NUM_PSEUDO, random_state=0, n_init=1, batch_size=8192).fit_predict(embeddings)
    labels = np.split(clusters, np.cumsum([len(column.row_N) for _, column in columns])[:-1])
    for (shard, column), label_N, view in zip(columns, labels, [0, 1, 2, 3] * len(cache.shards), strict=True):
        samples = read_samples(Path(cache.shard_url(shard)), DataConfig.model_validate({}), where=shard.shard_id)
        for sample, box, flip, label in zip(samples, column.box_N4.tolist(), column.flip_N, label_N, strict=True):
            image = decode(sample.data, max_pixels=10_000)
            pixels = apply_view(image, box, bool(flip), size=32, interpolation="bilinear")
            buffer = io.BytesIO()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
            yield f"{shard.shard_id}-{sample.key}-{view}", {"png": buffer.getvalue(), "cls": str(label).encode()}
