"""Real kills: whatever dies, and whenever, the finished cache has the bytes of an undisturbed one."""

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
from tests.faults.drivers import hear_ctrl_c, said, start, start_build, write
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
    """Many small parts, and a teacher that leaves a trace of what it is asked."""
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
    """Ends driver, worker or raylet of a build at random points; knows what was committed when nobody was alive."""

    config: Path
    folder: Path
    draw: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    num_agents: int = 0
    # (parts that were committed, number of batches the teacher had been asked by then)
    snapshots: list[tuple[set[str], int]] = field(default_factory=list)

    def run(self, num_kills: int) -> None:
        builders: list[subprocess.Popen[bytes]] = []
        while self.counts.total() < num_kills:
            if not builders:
                builders = [start_build(self.config) for _ in range(self.draw.choice((1, 1, 2)))]
            self._wait(builders[0])
            killed = self._kill(builders[0], self.draw.choice(("driver", "worker", "raylet")))
            if killed == "worker":
                if len(builders) == 1:
                    self._remember()
                continue
            for racer in builders[1:]:
                self._kill(racer, "driver")
            builders = []
            self._remember()
        # Whose worker was the last to be killed goes on, and so does a second one beside it.
        assert [builder.wait(300) for builder in builders] == [0] * len(builders), said(self.config)

    def _wait(self, builder: subprocess.Popen[bytes]) -> None:
        """To a random commit, or to a random moment of the start."""
        if self.draw.random() < 0.2:
            wait_until(lambda: builder.poll() is not None, self.draw.uniform(0, 6))
            return
        expected = len(committed(self.folder)) + self.draw.randint(1, 4)
        wait_until(lambda: builder.poll() is not None or len(committed(self.folder)) >= expected, 400)
        wait_until(lambda: False, self.draw.random() * 0.2)

    def _kill(self, builder: subprocess.Popen[bytes], expected: str) -> str:
        """Kills one process and returns what it was. After driver or raylet, the whole builder is gone."""
        if builder.poll() is not None:
            return "nothing"
        family = psutil.Process(builder.pid).children(recursive=True)
        found = [process for process in family if is_a(process, expected)]
        victim = self.draw.choice(found) if found else psutil.Process(builder.pid)
        killed = expected if found else "driver"
        victim.kill()
        self.counts[killed] += 1
        if killed != "worker":
            # A driver without its raylet ends by itself, and workers end without their driver. Ray's agents do not.
            builder.wait(60)
            self._end(family)
        return killed

    def _end(self, family: list[psutil.Process]) -> None:
        """Sees that a builder's processes end; kills the agents, which may have been at their very start, where they do
        not bear their names yet."""
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


def wait_until(holds: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)


def batches_of_parts(config: Path, folder: Path) -> dict[str, set[str]]:
    """What the teacher is asked for each part, by commit: one part after the other, without Ray."""
    tree = yaml.safe_load(config.read_text())
    tree["cache"]["url"], tree["ray"]["address"] = str(folder), "none"
    alone = Config.model_validate(tree)
    prepare(alone)
    found: dict[str, set[str]] = {}
    for task in open_tasks(alone):
        before = len(forwards())
        commit = build_part(task)
        found[commit_path(commit.shard_id, commit.block)] = {*forwards()[before:]}
    return found


def digest_of(found: dict[str, bytes]) -> str:
    whole = hashlib.sha256()
    for name, data in sorted(found.items()):
        whole.update(f"{name}\n{len(data)}\n".encode() + data)
    return whole.hexdigest()


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_a_build_killed_and_raced_at_random_points_ends_with_the_bytes_of_an_undisturbed_one(
    shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    monkeypatch.setenv(LOG, str(tmp_path / "forwards"))
    seed = int(os.environ.get("STILLROOM_TEST_SEED", "7"))
    undisturbed, config = (traced_file(tmp_path, name, shards) for name in ("undisturbed", "killed"))
    assert start_build(undisturbed).wait() == 0, said(undisturbed)
    asked_for = batches_of_parts(undisturbed, tmp_path / "mapped")
    kills = Kills(config, tmp_path / "killed", random.Random(seed))
    kills.run(NUM_KILLS)
    assert start_build(config).wait() == 0, said(config)
    whole, broken = files(str(tmp_path / "undisturbed")), files(str(tmp_path / "killed"))
    print(f"\nseed {seed}; {kills.counts.total()} kills: {dict(kills.counts)}; {kills.num_agents} agents of Ray left")
    print(f"committed at each: {[len(done) for done, _ in kills.snapshots]} of {len(asked_for)} parts")
    print(f"undisturbed {digest_of(whole)}\nkilled      {digest_of(broken)}")
    assert broken == whole
    assert len({*whole}) > len(asked_for)
    asked = forwards()
    for done, count in kills.snapshots:
        assert not set().union(*(asked_for[path] for path in done)) & {*asked[count:]}


def test_a_killed_worker_costs_a_retry_and_not_the_build(shards: list[str], tmp_path: Path) -> None:
    config = config_file(tmp_path, "worker", shards)
    process = start_build(config)
    wait_for_commits(tmp_path / "worker", 2, process)
    workers = [
        child for child in psutil.Process(process.pid).children(recursive=True) if "ray::" in " ".join(child.cmdline())
    ]
    busy = [child for child in workers if ": " in " ".join(child.cmdline())] or workers
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


@pytest.mark.exhaustive
def test_ctrl_c_on_a_cluster_that_goes_on_ends_what_was_in_flight(tmp_path: Path) -> None:
    flight = "list(fan_out(time.sleep, [600.0] * 4, RayConfig(address=sys.argv[1]), what='a task'))"
    script = f"import sys, time\nfrom jobs.ray.fan_out import fan_out\nfrom schemas.config import RayConfig\n{flight}"
    with head_node(tmp_path, num_cpus=2) as node:
        driver = subprocess.Popen([sys.executable, "-c", script, node.address], env=node.env, preexec_fn=hear_ctrl_c)
        wait_until(lambda: len(node.busy_workers()) == 2, 60)
        assert len(node.busy_workers()) == 2
        driver.send_signal(signal.SIGINT)
        assert driver.wait(60) == -signal.SIGINT
        wait_until(lambda: not node.busy_workers(), 30)
        assert not node.busy_workers()


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
    assert [json.loads(line)["step"] for line in lines] == list(range(160))
