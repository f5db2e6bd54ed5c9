"""Killed processes: whichever dies, and whenever, the finished cache has the bytes of an undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
import pytest

from pipeline.shards.writer import pack_shards
from tests.faults.builds import batches_of_parts, build_file, committed, digest_of, traced_file, training_file
from tests.faults.drivers import enable_ctrl_c, log_of, start, start_build
from tests.faults.networks import LOG, forwards
from tests.jobs.clusters import head_node
from tests.pipeline.caches import digit_samples, files
from tests.pipeline.student.runs import metrics
from tests.waiting import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]
NUM_KILLS = 12


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
            with suppress(subprocess.TimeoutExpired):
                builder.wait(self.random.uniform(0, 6))
            return
        expected = len(committed(self.folder)) + self.random.randint(1, 4)
        wait_until(lambda: builder.poll() is not None or len(committed(self.folder)) >= expected)
        time.sleep(self.random.random() * 0.2)

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
    config = build_file(tmp_path, "worker", shards)
    process = start_build(config)
    wait_until(lambda: len(committed(tmp_path / "worker")) >= 2, process, partial(log_of, config))
    workers = [
        child for child in psutil.Process(process.pid).children(recursive=True) if "ray::" in " ".join(child.cmdline())
    ]
    busy = [child for child in workers if ": " in " ".join(child.cmdline())] or workers
    busy[0].send_signal(signal.SIGKILL)
    assert process.wait() == 0, log_of(config)
    assert (tmp_path / "worker" / "manifest.json").exists()


def test_ctrl_c_exits_130_leaves_the_commits_and_prints_how_to_resume(shards: list[str], tmp_path: Path) -> None:
    config = build_file(tmp_path, "interrupted", shards)
    process = start_build(config)
    wait_until(lambda: committed(tmp_path / "interrupted"), process, partial(log_of, config))
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, log_of(config)
    assert f"python -m jobs.build_cache {config}" in log_of(config)
    assert committed(tmp_path / "interrupted")
    assert not (tmp_path / "interrupted" / "manifest.json").exists()


@pytest.mark.exhaustive
def test_ctrl_c_on_a_running_cluster_ends_the_tasks_in_flight(tmp_path: Path) -> None:
    flight = "list(fan_out(time.sleep, [600.0] * 4, RayConfig(address=sys.argv[1]), what='a task'))"
    script = f"import sys, time\nfrom jobs.ray.fan_out import fan_out\nfrom schemas.config import RayConfig\n{flight}"
    with head_node(tmp_path, num_cpus=2) as node:
        driver = subprocess.Popen([sys.executable, "-c", script, node.address], env=node.env, preexec_fn=enable_ctrl_c)
        wait_until(lambda: len(node.busy_workers()) == 2, timeout_s=60)
        driver.send_signal(signal.SIGINT)
        assert driver.wait(60) == -signal.SIGINT
        wait_until(lambda: not node.busy_workers(), timeout_s=30)


@pytest.mark.exhaustive
def test_ctrl_c_in_a_ray_training_exits_130_and_the_same_command_resumes(shards: list[str], tmp_path: Path) -> None:
    config = training_file(tmp_path, "training", shards)
    process = start("train_student", config)
    wait_until((tmp_path / "training" / "checkpoints" / "last.pt").exists, process, partial(log_of, config))
    process.send_signal(signal.SIGINT)
    assert process.wait(90) == 130, log_of(config)
    assert f"python -m jobs.train_student {config}" in log_of(config)
    assert not (tmp_path / "training" / "summary.json").exists()
    assert start("train_student", config).wait() == 0, log_of(config)
    assert [record["step"] for record in metrics(tmp_path / "training")] == list(range(160))
