"""A cache and runs of an old version open, verify, extend, evaluate, export and resume with the code of today."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.storage.config_files import load_config
from pipeline.student import CachedDataset
from pipeline.student.training.trainer import train
from tests.pipeline.student.runs import training_error

pytestmark = pytest.mark.long

V1 = Path(__file__).parent / "v1"
NUM_VAL = 12


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in; all its paths are relative to it."""
    folder = tmp_path / "v1"
    shutil.copytree(V1, folder)
    monkeypatch.chdir(folder)
    return folder


def expected(of: str) -> dict[str, Any]:
    return json.loads((V1 / "expected.json").read_text())[of]


def stillroom(*arguments: str) -> str:
    """What the command prints on standard output."""
    result = CliRunner().invoke(app, [*arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(run: Path) -> dict[int, dict[str, float]]:
    """By step: every number but the seconds."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: {name: value for name, value in record.items() if name != "step"} for record in records}


@pytest.mark.usefixtures("old")
def test_an_old_cache_opens_with_its_former_content() -> None:
    report, before = json.loads(stillroom("cache", "inspect", "cache", "--json")), expected("cache")
    assert {key: report[key] for key in before} == before


@pytest.mark.usefixtures("old")
def test_an_old_cache_verifies_also_against_its_teacher() -> None:
    shards = "shards/train-{00..01}.tar"
    report = json.loads(stillroom("cache", "verify", "cache", "--shards", shards, "--config", "config.yaml", "--json"))
    assert report["problems"] == []


def test_an_old_cache_is_extended_and_its_files_stay(old: Path) -> None:
    before = contents(old / "cache" / "parts")
    stillroom("cache", "build", "config.yaml", "views.count=4")
    after = contents(old / "cache" / "parts")
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 2
    assert json.loads(stillroom("cache", "inspect", "cache", "--json"))["num_views"] == 4
    stillroom("cache", "verify", "cache", "--shards", "shards/train-{00..01}.tar")


@pytest.mark.usefixtures("old")
def test_an_old_cache_is_a_dataset() -> None:
    data = CachedDataset("cache", shards="shards/train-{00..01}.tar", global_batch_size=8)
    with closing(data):
        batch = data[0]
    assert len(batch.labels_B) == 8


@pytest.mark.usefixtures("old")
@pytest.mark.parametrize("run", ["finished", "interrupted"])
def test_an_old_run_is_evaluated(run: str) -> None:
    report = json.loads(stillroom("evaluate", f"runs/{run}", "--shards", "shards/val-00.tar", "--json"))
    assert report["num_rows"] == NUM_VAL
    if run == "finished":
        before = expected("evaluation")
        # Another processor may round a logit otherwise, which can move one image across a border.
        for name in ("top1", "top5", "agreement", "teacher_top1"):
            assert report[name] == pytest.approx(before[name], abs=1 / NUM_VAL)
        config = load_config("config.yaml", ["data.cache=cache", f"run.url=runs/{run}"])
        assert report["kl"] == pytest.approx(before["kl"], rel=training_error(config, 1))


@pytest.mark.usefixtures("old")
def test_an_old_run_of_a_cache_alone_is_evaluated_and_exported() -> None:
    report = json.loads(stillroom("evaluate", "runs/cache-alone", "--shards", "shards/val-00.tar", "--json"))
    assert report["num_rows"] == NUM_VAL
    stillroom("export", "runs/cache-alone", "--out", "student.safetensors")
    assert load_file("student.safetensors")


def test_an_old_run_is_exported(old: Path) -> None:
    stillroom("export", "runs/finished", "--out", "student.safetensors")
    state = torch.load(old / "runs/finished/checkpoints/last.pt", weights_only=True)["model"]
    exported = load_file("student.safetensors")
    assert {name: value.tolist() for name, value in exported.items()} == {
        name: value.tolist() for name, value in state.items() if name in exported
    }
    assert len(exported) >= len(state) - sum(name.endswith("num_batches_tracked") for name in state)


def test_an_old_run_that_was_killed_ends_like_the_one_that_was_not(old: Path) -> None:
    config = load_config("config.yaml", ["data.cache=cache", "run.url=runs/interrupted"])
    train(config)
    undisturbed, resumed = losses(V1 / "runs/finished"), losses(old / "runs/interrupted")
    assert resumed.keys() == undisturbed.keys()
    for step, record in undisturbed.items():
        assert resumed[step] == pytest.approx(record, rel=training_error(config, step + 1)), step


@pytest.mark.usefixtures("old")
def test_an_old_run_that_is_finished_stays_so() -> None:
    before = contents(Path("runs/finished"))
    summary = train(load_config("config.yaml", ["data.cache=cache", "run.url=runs/finished"]))
    assert summary == expected("summary")
    assert contents(Path("runs/finished")) == before
