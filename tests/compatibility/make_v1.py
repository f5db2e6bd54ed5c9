"""Makes ``tests/compatibility/v1``: a cache and runs as commit 4d883fb wrote them, which every later version must open.

Run once at that commit, from an empty folder of a neutral name, and copied here as it is: it is never regenerated.

    PYTHONPATH=CHECKOUT CHECKOUT/.venv/bin/python -m tests.compatibility.make_v1

All paths in it are relative, so that a copy in any folder works from that folder. It holds:

    shards/train-00.tar, train-01.tar, val-00.tar   20 + 20 + 12 digits on coloured grounds
    teacher.safetensors                             the teacher's weights
    cache/                                          3 views, fp16 logits, int8 embeddings, class means of eval views
    config.yaml                                     the config of the cache and of the first two runs
    runs/finished                                   3 epochs of ce + kd + dist + nd + mse, evaluated
    runs/interrupted                                the same, killed after step 9 of 15; its checkpoint is of step 6
    runs/cache-alone                                1 epoch of kd with ``data: {cache: cache}`` alone
    expected.json                                   what commit 4d883fb reports of them
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from pipeline.cache.build.context import prepare
from pipeline.cache.build.manifest import publish_manifest
from pipeline.cache.build.part import PartTask, build_part
from pipeline.cache.ops.inspect import inspect_cache
from pipeline.models.cifar import resnet
from pipeline.shards.writer import pack_shards
from pipeline.storage.config_files import load_config
from pipeline.student.evaluation.evaluator import evaluate_run
from pipeline.student.training.trainer import train
from schemas.cache_format import ViewBlock
from schemas.config import Config
from tests.pipeline.caches import digit_samples

WIDTHS = [8, 8, 12, 16]
CONFIG: dict[str, Any] = {
    "data": {"shards": "shards/train-{00..01}.tar", "val_shards": "shards/val-00.tar", "num_classes": 10},
    "teacher": {
        "model": "python:pipeline.models.cifar:resnet",
        "kwargs": {"depth": 8, "widths": WIDTHS},
        "weights": "teacher.safetensors",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.25],
        "batch_size": 8,
    },
    "views": {"kind": "function_matching", "count": 3, "size": 32, "mix_group": 8, "area": [0.3, 1.0], "cutmix": 0.5},
    "cache": {
        "url": "cache",
        "logits": "fp16",
        "embeddings": "int8",
        "class_means": "eval",
        "views_per_part": 2,
    },
    "student": {
        "model": "python:pipeline.models.cifar:resnet",
        "kwargs": {"depth": 8, "widths": [8, 12, 12, 16]},
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.25],
    },
    "loss": [
        {"name": "ce"},
        {"name": "kd", "temperature": 2.0},
        {"name": "dist", "weight": 2.0},
        {"name": "nd"},
        {"name": "mse", "weight": 0.1},
    ],
    "train": {
        "epochs": 3,
        "global_batch_size": 8,
        "optimizer": "sgd",
        "lr": 0.05,
        "warmup_steps": 2,
        "clip_norm": 5.0,
        "ema": 0.8,
        "checkpoint_every_steps": 3,
    },
    "ray": {"address": "none"},
}
TRAIN = "shards/train-00.tar", "shards/train-01.tar"
BLOCKS = ViewBlock(start=0, stop=2), ViewBlock(start=2, stop=3), ViewBlock(start=0, stop=1, is_eval=True)
CHECKPOINTED_STEP = 6


def run_config(run: str) -> Config:
    return load_config("config.yaml", ["data.cache=cache", f"run.url=runs/{run}"])


def interrupt(event: dict[str, Any]) -> None:
    if event["kind"] == "step" and event["step"] > CHECKPOINTED_STEP:
        os._exit(9)


def make() -> None:
    samples = list(digit_samples(52))
    pack_shards(samples[:40], "shards/train-%02d.tar", shard_size=20)
    pack_shards(samples[40:], "shards/val-%02d.tar", shard_size=20)
    torch.manual_seed(0)
    save_file(resnet(num_classes=10, depth=8, widths=WIDTHS).state_dict(), "teacher.safetensors")
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    config = load_config("config.yaml")
    prepare(config)
    for url in TRAIN:
        for block in BLOCKS:
            build_part(PartTask(config, url, block))
    publish_manifest("cache", {Path(url).stem: url for url in TRAIN})
    summary = train(run_config("finished"))
    killed = subprocess.run([sys.executable, "-m", "tests.compatibility.make_v1", "interrupt"], check=False)
    assert killed.returncode == 9
    keys = {"student": CONFIG["student"], "loss": [{"name": "kd"}], "ray": CONFIG["ray"]}
    alone = {**keys, "data": {"cache": "cache"}, "train": {"global_batch_size": 8}, "run": {"url": "runs/cache-alone"}}
    train(Config.model_validate(alone))
    evaluation = evaluate_run(
        "runs/finished", "shards/val-00.tar", checkpoint_name="last", num_threads=1, device=torch.device("cpu")
    )
    held = inspect_cache("cache").as_dict()
    expected = {"summary": summary, "evaluation": evaluation.as_dict(), "cache": held}
    Path("expected.json").write_text(json.dumps(expected, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["interrupt"]:
        train(run_config("interrupted"), report=interrupt)
    else:
        make()
