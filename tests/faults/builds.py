"""Configs of the builds and trainings that are disturbed, and what their folders contain."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml

from pipeline.cache.build.context import prepare
from pipeline.cache.build.part import build_part
from pipeline.cache.format.layout import commit_path
from pipeline.student.run import checkpoint
from schemas.config import Config
from tests.faults.drivers import write
from tests.faults.networks import forwards
from tests.jobs.conftest import NETWORK
from tests.pipeline.caches import open_tasks


def build_file(folder: Path, name: str, shards: list[str]) -> Path:
    return write(
        folder / f"{name}.yaml",
        {
            "data": {"shards": shards, "num_classes": 10},
            "teacher": {**NETWORK, "weights": "random", "kwargs": {"depth": 14}, "batch_size": 8},
            "views": {"kind": "function_matching", "count": 12, "size": 32, "mix_group": 32},
            "cache": {"url": str(folder / name), "class_means": "eval", "views_per_part": 4},
            "ray": {"address": "local"},
        },
    )


def traced_file(folder: Path, name: str, shards: list[str]) -> Path:
    """Many small parts, and a teacher that records its batches."""
    teacher = {"model": "python:tests.faults.networks:Traced", "kwargs": {}}
    path = build_file(folder, name, shards)
    return edited(path, teacher=teacher, views={"count": 24}, cache={"views_per_part": 2})


def training_file(folder: Path, name: str, shards: list[str]) -> Path:
    return write(
        folder / f"{name}.yaml",
        {
            "data": {"shards": shards, "num_classes": 10, "local_dir": str(folder / f"{name}-node")},
            "teacher": {"mode": "none"},
            "views": {"kind": "crop", "size": 16},
            "student": NETWORK,
            "loss": [{"name": "ce"}],
            "train": {"epochs": 16, "global_batch_size": 40},
            "run": {"url": str(folder / name)},
            "ray": {"address": "local", "num_workers": 2},
        },
    )


def edited(path: Path, **sections: dict[str, Any]) -> Path:
    """The same file, with these keys in the sections of its config."""
    tree = yaml.safe_load(path.read_text())
    for name, keys in sections.items():
        tree[name] |= keys
    return write(path, tree)


def local_config(path: Path, folder: Path) -> Config:
    """The same build as a plain loop into another folder."""
    tree = yaml.safe_load(path.read_text())
    tree["cache"]["url"], tree["ray"]["address"] = str(folder), "none"
    return Config.model_validate(tree)


def committed(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.glob("commits/*/*.json")}


def batches_of_parts(path: Path, folder: Path) -> dict[str, set[str]]:
    """The batches of the teacher for each part, by commit: one part after another, without Ray."""
    config = local_config(path, folder)
    prepare(config)
    batches: dict[str, set[str]] = {}
    for task in open_tasks(config):
        before = len(forwards())
        commit = build_part(task)
        batches[commit_path(commit.shard_id, commit.block)] = {*forwards()[before:]}
    return batches


def digest_of(contents: dict[str, bytes]) -> str:
    state = hashlib.sha256()
    for name, data in sorted(contents.items()):
        state.update(f"{name}\n{len(data)}\n".encode() + data)
    return state.hexdigest()


def steps_at(run: Path) -> int:
    """The step of the last checkpoint; 0 without a checkpoint."""
    state = checkpoint.load(str(run), checkpoint.LAST)
    return 0 if state is None else state["step"]
