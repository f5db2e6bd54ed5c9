"""``ray job submit`` and ``stillroom submit`` on a local cluster: jobs from upload to results."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults.drivers import enable_ctrl_c
from tests.jobs.clusters import HeadNode, head_node
from tests.jobs.conftest import Tree
from tests.marks import slow
from tests.waiting import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory):
    with head_node(tmp_path_factory.mktemp("cluster"), num_cpus=4) as node:
        yield node


def submit(cluster: HeadNode, *entrypoint: str) -> subprocess.CompletedProcess[str]:
    """Runs ``ray job submit``, which uploads the checkout, follows the job's log and exits as the job does."""
    ray = Path(sys.executable).parent / "ray"
    command = [ray, "job", "submit", "--address", cluster.dashboard_url, "--working-dir", ".", "--", *entrypoint]
    return subprocess.run(command, cwd=ROOT, env=cluster.env, capture_output=True, text=True, timeout=400, check=False)


def write(tree: dict[str, object], path: Path) -> str:
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def test_a_submitted_distill_job_streams_its_log_and_leaves_cache_and_student(
    cluster: HeadNode, tree: Tree, tmp_path: Path
) -> None:
    config = write(tree(ray={"address": "auto", "num_workers": 2}), tmp_path / "distill.yaml")
    done = submit(cluster, "python", "-m", "jobs.distill", config, "train.epochs=3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cache: 96 images x 3 views in 4 shards" in done.stdout
    assert "12 steps" in done.stdout
    assert "succeeded" in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["epochs"]) == (12, 3)
    assert (tmp_path / "cache" / "manifest.json").exists()


@pytest.mark.parametrize("module", ["build_cache", slow("train_student")])
def test_a_submitted_job_with_bad_input_shows_one_message(
    module: str, cluster: HeadNode, tree: Tree, tmp_path: Path
) -> None:
    config = write(tree(ray={"address": "auto"}, views={"kind": "crops"}), tmp_path / "bad.yaml")
    done = submit(cluster, "python", "-m", f"jobs.{module}", config)
    assert done.returncode == 1
    assert "views.kind" in done.stdout
    assert "exit code 2" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout


def stillroom(cluster: HeadNode, folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """``stillroom submit`` from a folder."""
    command = [sys.executable, "-m", "jobs.cli", "submit", *arguments, "--address", cluster.dashboard_url]
    environment = {**cluster.env, **env}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False
    )


def request(cluster: HeadNode, job: str, what: str = "", method: str = "GET") -> dict[str, Any]:
    """The response of the Jobs API about a job, without Ray's client."""
    headers = {"Authorization": f"Bearer {Path(cluster.env['RAY_AUTH_TOKEN_PATH']).read_text()}"}
    call = urllib.request.Request(f"{cluster.dashboard_url}/api/jobs/{job}{what}", headers=headers, method=method)
    with urllib.request.urlopen(call, timeout=30) as response:
        return json.loads(response.read())


@pytest.mark.exhaustive
def test_stillroom_submit_builds_trains_and_distills_and_passes_variables_without_showing_them(
    cluster: HeadNode, tree: Tree, tmp_path: Path
) -> None:
    value = str(tmp_path / "hush-4711")
    place = "${oc.env:STILLROOM_TEST_CACHE}"
    sections = tree(ray={"address": "auto"}, cache={"url": place}, data={"cache": place})
    # Outside of the working directory: the config is uploaded anyway.
    config = write(sections, tmp_path / "both.yaml")
    (tmp_path / "code").mkdir()
    for command in ("build", "train", "distill"):
        options = ["--env", "STILLROOM_TEST_CACHE", "--submission-id", command, "--entrypoint-cpus", "0.5"]
        overrides = ["train.epochs=1", f"run.url={tmp_path / command}"]
        arguments = [command, config, *overrides, *options]
        done = stillroom(cluster, tmp_path / "code", *arguments, STILLROOM_TEST_CACHE=value)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout == request(cluster, command, "/logs")["logs"]
        assert "give it no credentials: STILLROOM_TEST_CACHE" in done.stderr
        info = request(cluster, command)
        assert info["metadata"].keys() == {"project", "command", "config_fingerprint"}
        assert (info["metadata"]["project"], info["metadata"]["command"]) == ("stillroom", command)
        assert "hush-4711" not in done.stdout + done.stderr + str(info["metadata"]) + info["entrypoint"]
    assert (tmp_path / "hush-4711" / "manifest.json").exists()
    for run in (tmp_path / "train", tmp_path / "distill"):
        assert json.loads((run / "summary.json").read_text())["steps"] == 4
        assert (run / "checkpoints" / "last.pt").stat().st_size > 0


@pytest.mark.exhaustive
def test_stillroom_submit_exits_as_the_job_does_and_refuses_a_used_id_and_a_wrong_token(
    cluster: HeadNode, tree: Tree, tmp_path: Path
) -> None:
    config = write(tree(ray={"address": "auto"}, data={"shards": "/nowhere/a.tar"}), tmp_path / "bad.yaml")
    arguments = ["build", config, "--submission-id", "used"]
    done = stillroom(cluster, tmp_path, *arguments)
    assert (done.returncode, "/nowhere/a.tar" in done.stdout) == (2, True), done.stdout + done.stderr
    assert "job used failed with exit code 2" in done.stderr
    again = stillroom(cluster, tmp_path, *arguments)
    assert (again.returncode, again.stdout) == (2, "")
    assert "the cluster already has a job of this submission id" in again.stderr
    (tmp_path / "token").write_text("fedcba9876543210" * 4)
    foreign = stillroom(cluster, tmp_path, "build", config, RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert (foreign.returncode, foreign.stdout) == (2, "")
    assert "the cluster did not accept the token" in foreign.stderr


def wheel(folder: Path, name: str, code: str) -> Path:
    """A wheel of one module without dependencies."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as package:
        package.writestr(f"{name}.py", code)
        package.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        package.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        package.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return Path(str(package.filename))


@pytest.mark.exhaustive
def test_factories_come_from_the_submitted_folder_or_from_pip_and_a_failed_install_is_reported(
    tree: Tree, tmp_path: Path
) -> None:
    code = "from pipeline.models.cifar import resnet\n\ndef build(num_classes):\n"
    code += "    return resnet(num_classes=num_classes, depth=8, widths=(4, 4, 6, 8))\n"
    teacher = {"model": "python:lent_teacher:build", "kwargs": {}}
    config = write(tree(ray={"address": "auto"}, teacher=teacher), tmp_path / "build.yaml")
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"{wheel(tmp_path, 'lent_teacher', code)}\n")
    (tmp_path / "code").mkdir()
    # In the folder of the config, which is not submitted.
    (tmp_path / "lent_teacher.py").write_text(code)
    # Ray copies its virtual environment. This one is small and imports the packages of the tests' environment.
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(environment)})
    Path(packages, "all.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    with head_node(tmp_path, num_cpus=2, python=str(environment / "bin" / "python")) as cluster:
        without = stillroom(cluster, tmp_path / "code", "build", config)
        assert (without.returncode, "lent_teacher" in without.stdout) == (2, True), without.stdout + without.stderr
        done = stillroom(cluster, tmp_path / "code", "build", config, "--pip", str(requirements))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "cache: 96 images x 3 views in 4 shards" in done.stdout
        requirements.write_text(f"{tmp_path}/no_such_package-1.0-py3-none-any.whl\n")
        failed = stillroom(cluster, tmp_path / "code", "build", config, "--pip", str(requirements))
        assert failed.returncode == 1, failed.stdout + failed.stderr
        assert "no_such_package" in failed.stderr


SLOW_TEACHER = """
import time
from pathlib import Path
from pipeline.models.cifar import resnet

def build(num_classes, folder):
    network = resnet(num_classes=num_classes, depth=8, widths=(4, 4, 6, 8))

    def wait(*_):
        time.sleep(0.3 * (Path(folder) / "slow").exists())
        while (Path(folder) / "hold").exists():
            time.sleep(0.1)

    network.register_forward_pre_hook(wait)
    return network
"""


@dataclass(frozen=True, slots=True)
class SlowBuild:
    """A build with a teacher of the working directory: slow while a file ``slow`` exists, halted by a file ``hold``."""

    folder: Path
    config: str

    @contextmanager
    def submitted(self, cluster: HeadNode, job: str, stdin: int) -> Iterator[subprocess.Popen[str]]:
        """``stillroom submit`` while it runs."""
        arguments = ["submit", "build", self.config, "--submission-id", job, "--address", cluster.dashboard_url]
        with (self.folder / "out").open("w") as out, (self.folder / "err").open("w") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", *arguments],
                cwd=self.folder / "code",
                env=cluster.env,
                stdin=stdin,
                stdout=out,
                stderr=err,
                preexec_fn=enable_ctrl_c,
            )
            try:
                yield process
            finally:
                process.kill()
                process.wait()

    def errors(self) -> str:
        return (self.folder / "err").read_text()

    def log(self) -> str:
        return (self.folder / "out").read_text()

    def output(self) -> str:
        return self.log() + self.errors()


@pytest.fixture
def slow_build(tree: Tree, shards: list[str], tmp_path: Path) -> SlowBuild:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "slow_teacher.py").write_text(SLOW_TEACHER)
    (tmp_path / "slow").touch()
    copies = [shutil.copy(shard, tmp_path) for shard in shards]
    teacher = {"model": "python:slow_teacher:build", "kwargs": {"folder": str(tmp_path)}}
    sections = tree(ray={"address": "auto"}, data={"shards": copies}, teacher=teacher)
    return SlowBuild(tmp_path, write(sections, tmp_path / "build.yaml"))


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """The ends of a pseudo-terminal: the test writes to the first, a command reads from the second."""
    ends = os.openpty()
    yield ends
    for end in ends:
        os.close(end)


@pytest.mark.exhaustive
def test_ctrl_c_asks_and_stops_the_job_and_submitting_again_repeats_nothing_that_is_committed(
    cluster: HeadNode, slow_build: SlowBuild, terminal: tuple[int, int]
) -> None:
    folder, (keys, stdin) = slow_build.folder, terminal
    with slow_build.submitted(cluster, "stopped", stdin) as process:
        wait_until(lambda: len(list(folder.glob("cache/commits/digits-00/*.json"))) == 3, process, slow_build.output)
        (folder / "hold").touch()
        process.send_signal(signal.SIGINT)
        wait_until(lambda: "stop the job?" in slow_build.errors(), process, slow_build.output)
        os.write(keys, b"n\n")
        wait_until(lambda: "following job stopped" in slow_build.errors(), process, slow_build.output)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: slow_build.errors().count("stop the job?") == 2, process, slow_build.output)
        os.write(keys, b"y\n")
        assert process.wait(60) == 130, slow_build.errors()
    assert "job stopped was stopped" in slow_build.errors()
    assert request(cluster, "stopped")["status"] == "STOPPED"
    # Each line was printed once over all connections to the log.
    assert slow_build.log() == request(cluster, "stopped", "/logs")["logs"]
    assert not (folder / "cache" / "manifest.json").exists()
    # A build that reads this shard again finds no image in it.
    committed = folder / "digits-00.tar"
    committed.write_bytes(bytes(committed.stat().st_size))
    for name in ("hold", "slow"):
        (folder / name).unlink()
    done = stillroom(cluster, folder / "code", "build", slow_build.config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cache: 96 images x 3 views in 4 shards" in done.stdout


@pytest.mark.parametrize("has_terminal", [slow(False), True])
def test_ctrl_c_without_a_terminal_and_a_second_one_leave_the_job_running_and_print_how_to_stop_it(
    has_terminal: bool, cluster: HeadNode, slow_build: SlowBuild, terminal: tuple[int, int]
) -> None:
    (slow_build.folder / "hold").touch()
    job = f"left-{has_terminal}"
    with slow_build.submitted(cluster, job, terminal[1] if has_terminal else subprocess.DEVNULL) as process:
        wait_until(lambda: "Running entrypoint" in slow_build.log(), process, slow_build.output)
        process.send_signal(signal.SIGINT)
        if has_terminal:
            wait_until(lambda: "stop the job?" in slow_build.errors(), process, slow_build.output)
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, slow_build.errors()
    assert f"job {job} continues" in slow_build.errors()
    assert f"ray job stop --address {cluster.dashboard_url} {job}" in slow_build.errors()
    assert request(cluster, job)["status"] == "RUNNING"
    assert request(cluster, job, "/stop", "POST") == {"stopped": True}
