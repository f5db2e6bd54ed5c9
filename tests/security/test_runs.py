"""An untrusted run: its config and its files run no code."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.run_ops import evaluate
from pipeline.core.errors import InputError
from pipeline.core.hashing import seal
from pipeline.student.export.exporters import export_run
from pipeline.student.run import checkpoint
from pipeline.student.training.trainer import train
from tests.pipeline.caches import TinyCache
from tests.pipeline.student.runs import run_config


def _read(run: Path, shards: str) -> None:
    """All commands that read an untrusted run."""
    for read in (
        lambda: evaluate(str(run), shards),
        lambda: export_run(
            str(run), f"{run}/out.safetensors", format=None, checkpoint_name="last", with_normalization=False
        ),
    ):
        with pytest.raises(InputError, match=r"cannot be imported|must be your code|not the name of a factory|wrong"):
            read()


def test_a_run_executes_neither_code_in_its_folder_nor_functions_of_python(
    tiny_cache: TinyCache, tmp_path: Path
) -> None:
    run, made = tmp_path / "run", tmp_path / "made"
    train(run_config(tiny_cache.config, run, train={"epochs": 1}))
    for folder in (run, run / "checkpoints"):
        (folder / "brought_by_a_run.py").write_text(f"import os\nos.mkdir({str(made)!r})\n")
    body = json.loads((run / checkpoint.CONFIG).read_bytes())
    shards = str(tiny_cache.config.data.shards[0])
    changes: list[dict[str, Any]] = [
        {"model": "python:brought_by_a_run:build"},
        {"model": f"python:{run}/brought_by_a_run:build"},
        {"model": "python:os:mkdir", "kwargs": {"path": str(made)}},
        {"model": "python:tests.pipeline.models.imported:make_folder", "kwargs": {"path": str(made)}},
        {"model": "python:torch.hub:load", "kwargs": {"repo_or_dir": str(run), "source": "local", "model": "net"}},
        {"model": 7},
    ]
    for change in changes:
        student = {**body["student"], **change}
        (run / checkpoint.CONFIG).write_bytes(seal({**body, "student": student}))
        _read(run, shards)
    assert not made.exists()
    assert "brought_by_a_run" not in sys.modules
