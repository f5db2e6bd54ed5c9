"""Killed processes: whichever dies, and whenever, the finished cache has the bytes of an undisturbed one."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import yaml

from pipeline.cache.build.context import prepare
from pipeline.cache.build.part import build_part
from pipeline.cache.format.layout import commit_path
from pipeline.shards.writer import pack_shards
from schemas.config import Config
from tests.faults.drivers import enable_ctrl_c, log_of, start, start_build, write
from tests.faults.networks import LOG, forwards
from tests.jobs.clusters import head_node
from tests.jobs.conftest import NETWORK
from tests.pipeline.caches import digit_samples, files, open_tasks

pytestmark = [pytest.mark.ray, pytest.mark.slow]
NUM_KILLS = 12


def config_file(folder: Path, name: str, shards: list[str]) -> Path:
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
    path = config_file(folder, name, shards)
    tree = yaml.safe_load(path.read_text())
    tree["teacher"] |= {"model": "python:tests.faults.networks:Traced", "kwargs": {}}
    tree["views"]["count"] = 24
    tree["cache"]["views_per_part"] = 2
    return write(path, tree)


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


def wait_for_commits(folder: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    wait_for(folder, "commits/*/*.json", count, process)


def wait_for(folder: Path, pattern: str, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 400
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < deadline, f"{folder} has fewer than {count} of {pattern}"
        if process.poll() is not None:
            return
        time.sleep(0.02)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("shards")
    return pack_shards(digit_samples(400), f"{folder}/digits-%02d.tar", shard_size=80)


@dataclass
class Kills:
    """Kills the driver, a worker or the raylet of a build at random times."""

    config: Path
    folder: Path
    random: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    num_agents: int = 0
    # (commits, number of batches of the teacher) at each time without a running builder.
    snapshots: list[tuple[set[str], int]] = field(default_factory=list)

    def run(self, num_kills: int) -> None:
        builders: list[subprocess.Popen[bytes]] = []
        while self.counts.total() < num_kills:
            if not builders:
                builders = [start_build(self.config) for _ in range(self.random.choice((1, 1, 2)))]
            self._wait(builders[0])
            killed = self._kill(builders[0], self.random.choice(("driver", "worker", "raylet")))
            if killed == "worker":
                if len(builders) == 1:
                    self._remember()
                continue
            for racer in builders[1:]:
                self._kill(racer, "driver")
            builders = []
            self._remember()
        # A builder continues after the kill of its worker, and so does a second builder.
        assert [builder.wait(300) for builder in builders] == [0] * len(builders), log_of(self.config)

    def _wait(self, builder: subprocess.Popen[bytes]) -> None:
        """Waits for a random commit, or for a random time of the start."""
        if self.random.random() < 0.2:
            wait_until(lambda: builder.poll() is not None, self.random.uniform(0, 6))
            return
        expected = len(committed(self.folder)) + self.random.randint(1, 4)
        wait_until(lambda: builder.poll() is not None or len(committed(self.folder)) >= expected, 400)
        wait_until(lambda: False, self.random.random() * 0.2)

    def _kill(self, builder: subprocess.Popen[bytes], expected: str) -> str:
        """Kills one process and returns its kind. The kill of a driver or raylet ends the builder."""
        if builder.poll() is not None:
            return "nothing"
        family = psutil.Process(builder.pid).children(recursive=True)
        candidates = [process for process in family if is_a(process, expected)]
        victim = self.random.choice(candidates) if candidates else psutil.Process(builder.pid)
        killed = expected if candidates else "driver"
        victim.kill()
        self.counts[killed] += 1
        if killed != "worker":
            # A driver ends without its raylet, and workers end without their driver. Ray's agents do not.
            builder.wait(60)
            self._end(family)
        return killed

    def _end(self, family: list[psutil.Process]) -> None:
        """Waits for the end of a builder's processes, and kills the agents as soon as they have their names."""
        deadline = time.monotonic() + 60
        agents: set[psutil.Process] = set()
        while family and time.monotonic() < deadline:
            for process in (process for process in family if is_a(process, "agent")):
                process.kill()
                agents.add(process)
            family = psutil.wait_procs(family, timeout=1)[1]
        self.num_agents += len(agents)
        assert not family

    def _remember(self) -> None:
        done = committed(self.folder)
        self.snapshots.append((done, len(forwards())))


def is_a(process: psutil.Process, kind: str) -> bool:
    try:
        command = " ".join(process.cmdline())
    except psutil.Error:
        return False
    is_agent = command.startswith("ray::") and "Agent" in command
    kinds = {
        "agent": is_agent,
        "worker": command.startswith("ray::") and not is_agent,
        "raylet": "/raylet/raylet" in command,
        "driver": False,
    }
    return kinds[kind]


def committed(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.glob("commits/*/*.json")}


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def batches_of_parts(config: Path, folder: Path) -> dict[str, set[str]]:
    """The batches of the teacher for each part, by commit: one part after another, without Ray."""
    tree = yaml.safe_load(config.read_text())
    tree["cache"]["url"], tree["ray"]["address"] = str(folder), "none"
    config_without_ray = Config.model_validate(tree)
    prepare(config_without_ray)
    batches: dict[str, set[str]] = {}
    for task in open_tasks(config_without_ray):
        before = len(forwards())
        commit = build_part(task)
        batches[commit_path(commit.shard_id, commit.block)] = {*forwards()[before:]}
    return batches


def digest_of(contents: dict[str, bytes]) -> str:
    state = hashlib.sha256()
    for name, data in sorted(contents.items()):
        state.update(f"{name}\n{len(data)}\n".encode() + data)
    return state.hexdigest()


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_a_build_killed_and_raced_at_random_times_has_the_bytes_of_an_undisturbed_one(
    shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    monkeypatch.setenv(LOG, str(tmp_path / "forwards"))
    seed = int(os.environ.get("STILLROOM_TEST_SEED", "7"))
    undisturbed, config = (traced_file(tmp_path, name, shards) for name in ("undisturbed", "killed"))
    assert start_build(undisturbed).wait() == 0, log_of(undisturbed)
    batches_by_commit = batches_of_parts(undisturbed, tmp_path / "mapped")
    kills = Kills(config, tmp_path / "killed", random.Random(seed))
    kills.run(NUM_KILLS)
    assert start_build(config).wait() == 0, log_of(config)
    expected, actual = files(str(tmp_path / "undisturbed")), files(str(tmp_path / "killed"))
    print(f"\nseed {seed}; {kills.counts.total()} kills: {dict(kills.counts)}; {kills.num_agents} agents of Ray left")
    print(f"committed at each: {[len(done) for done, _ in kills.snapshots]} of {len(batches_by_commit)} parts")
    print(f"undisturbed {digest_of(expected)}\nkilled      {digest_of(actual)}")
    assert actual == expected
    assert len({*expected}) > len(batches_by_commit)
    all_batches = forwards()
    for done, count in kills.snapshots:
        assert not set().union(*(batches_by_commit[path] for path in done)) & {*all_batches[count:]}


def test_a_killed_worker_costs_a_retry_and_not_the_build(shards: list[str], tmp_path: Path) -> None:
    config = config_file(tmp_path, "worker", shards)
    process = start_build(config)
    wait_for_commits(tmp_path / "worker", 2, process)
    workers = [
        child for child in psutil.Process(process.pid).children(recursive=True) if "ray::" in " ".join(child.cmdline())
    ]
    busy = [child for child in workers if ": " in " ".join(child.cmdline())] or workers
    busy[0].send_signal(signal.SIGKILL)
    assert process.wait() == 0, log_of(config)
    assert (tmp_path / "worker" / "manifest.json").exists()


def test_ctrl_c_exits_130_leaves_the_commits_and_prints_how_to_resume(shards: list[str], tmp_path: Path) -> None:
    config = config_file(tmp_path, "interrupted", shards)
    process = start_build(config)
    wait_for_commits(tmp_path / "interrupted", 1, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, log_of(config)
    assert f"python -m jobs.build_cache {config}" in log_of(config)
    assert list((tmp_path / "interrupted").glob("commits/*/*.json"))
    assert not (tmp_path / "interrupted" / "manifest.json").exists()


@pytest.mark.exhaustive
def test_ctrl_c_on_a_running_cluster_ends_the_tasks_in_flight(tmp_path: Path) -> None:
    flight = "list(fan_out(time.sleep, [600.0] * 4, RayConfig(address=sys.argv[1]), what='a task'))"
    script = f"import sys, time\nfrom jobs.ray.fan_out import fan_out\nfrom schemas.config import RayConfig\n{flight}"
    with head_node(tmp_path, num_cpus=2) as node:
        driver = subprocess.Popen([sys.executable, "-c", script, node.address], env=node.env, preexec_fn=enable_ctrl_c)
        wait_until(lambda: len(node.busy_workers()) == 2, 60)
        assert len(node.busy_workers()) == 2
        driver.send_signal(signal.SIGINT)
        assert driver.wait(60) == -signal.SIGINT
        wait_until(lambda: not node.busy_workers(), 30)
        assert not node.busy_workers()


def test_ctrl_c_in_a_ray_training_exits_130_and_the_same_command_resumes(shards: list[str], tmp_path: Path) -> None:
    config = training_file(tmp_path, "training", shards)
    process = start("train_student", config)
    wait_for(tmp_path / "training", "checkpoints/last.pt", 1, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(90) == 130, log_of(config)
    assert f"python -m jobs.train_student {config}" in log_of(config)
    assert not (tmp_path / "training" / "summary.json").exists()
    assert start("train_student", config).wait() == 0, log_of(config)
    lines = (tmp_path / "training" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(160))
