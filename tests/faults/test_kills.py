"""Real kills: whatever dies, and whenever, the finished cache has the bytes of an undisturbed one."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from pipeline.shards.write import pack_shards
from tests.jobs.conftest import NETWORK, files_below
from tests.pipeline.caches import digit_samples

pytestmark = [pytest.mark.ray, pytest.mark.slow]
NUM_KILLS = 4


def config_file(folder: Path, name: str, shards: list[str]) -> Path:
    return write(
        folder / f"{name}.yaml",
        {
            "data": {"shards": shards, "num_classes": 10},
            "teacher": {**NETWORK, "kwargs": {"depth": 14}, "batch_size": 8},
            "views": {"kind": "function_matching", "count": 12, "size": 32, "mix_group": 32},
            "cache": {"url": str(folder / name), "class_means": "eval", "views_per_part": 4},
            "ray": {"address": "local"},
        },
    )


def training_file(folder: Path, name: str, shards: list[str]) -> Path:
    return write(
        folder / f"{name}.yaml",
        {
            "data": {"shards": shards, "num_classes": 10},
            "teacher": {"mode": "none"},
            "views": {"kind": "crop", "size": 16},
            "student": NETWORK,
            "loss": [{"name": "ce"}],
            "train": {"epochs": 40, "global_batch_size": 40},
            "run": {"url": str(folder / name)},
            "ray": {"address": "local", "num_workers": 2},
        },
    )


def write(path: Path, tree: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


def start(job: str, config: Path) -> subprocess.Popen[bytes]:
    """A job in a session of its own that hears Ctrl-C; what it says goes to ``said(config)``."""
    command = [sys.executable, "-m", f"jobs.{job}", str(config)]
    with config.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, preexec_fn=_hear_ctrl_c)


def _hear_ctrl_c() -> None:
    """Whoever runs the tests in the background of a script has them, and all they start, ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_build(config: Path) -> subprocess.Popen[bytes]:
    return start("build_cache", config)


def said(config: Path) -> str:
    return config.with_suffix(".log").read_text()


def end(process: subprocess.Popen[bytes]) -> None:
    """The driver and all that it started, by process id."""
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    for pid in family:
        try:
            psutil.Process(pid).kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def wait_for_commits(folder: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    wait_for(folder, "commits/*/*.json", count, process)


def wait_for(folder: Path, pattern: str, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < deadline
        if process.poll() is not None:
            return
        time.sleep(0.02)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("shards")
    return pack_shards(digit_samples(400), f"{folder}/digits-%02d.tar", shard_size=80)


def test_a_build_killed_at_random_points_ends_with_the_bytes_of_an_undisturbed_one(
    shards: list[str], tmp_path: Path
) -> None:
    undisturbed = config_file(tmp_path, "undisturbed", shards)
    assert start_build(undisturbed).wait() == 0, said(undisturbed)
    config = config_file(tmp_path, "killed", shards)
    draw = random.Random(7)
    for _ in range(NUM_KILLS):
        process = start_build(config)
        seen = len(list((tmp_path / "killed").glob("commits/*/*.json")))
        wait_for_commits(tmp_path / "killed", seen + draw.randint(1, 3), process)
        time.sleep(draw.random() * 0.2)
        end(process)
    assert start_build(config).wait() == 0, said(config)
    assert files_below(tmp_path / "killed") == files_below(tmp_path / "undisturbed")


def test_a_killed_worker_costs_a_retry_and_not_the_build(shards: list[str], tmp_path: Path) -> None:
    config = config_file(tmp_path, "worker", shards)
    process = start_build(config)
    wait_for_commits(tmp_path / "worker", 2, process)
    workers = [
        child for child in psutil.Process(process.pid).children(recursive=True) if "ray::" in " ".join(child.cmdline())
    ]
    busy = [child for child in workers if "_call" in " ".join(child.cmdline())] or workers
    busy[0].send_signal(signal.SIGKILL)
    assert process.wait() == 0, said(config)
    assert (tmp_path / "worker" / "manifest.json").exists()


def test_ctrl_c_exits_130_keeps_commits_and_prints_how_to_resume(shards: list[str], tmp_path: Path) -> None:
    config = config_file(tmp_path, "interrupted", shards)
    process = start_build(config)
    wait_for_commits(tmp_path / "interrupted", 1, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, said(config)
    assert f"python -m jobs.build_cache {config}" in said(config)
    assert list((tmp_path / "interrupted").glob("commits/*/*.json"))
    assert not (tmp_path / "interrupted" / "manifest.json").exists()


def test_ctrl_c_in_a_ray_training_exits_130_and_the_same_command_goes_on(shards: list[str], tmp_path: Path) -> None:
    config = training_file(tmp_path, "training", shards)
    process = start("train_student", config)
    wait_for(tmp_path / "training", "checkpoints/last.pt", 1, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(90) == 130, said(config)
    assert f"python -m jobs.train_student {config}" in said(config)
    assert not (tmp_path / "training" / "summary.json").exists()
    assert start("train_student", config).wait() == 0, said(config)
    lines = (tmp_path / "training" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(400))
