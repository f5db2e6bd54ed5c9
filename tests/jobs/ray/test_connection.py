"""Connections to a Ray cluster, and private clusters: each failure is one early error."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from jobs.ray.cluster import cluster
from jobs.ray.connection import connect
from pipeline.core.errors import ResourceError
from schemas.config import Config, RayConfig
from tests.errors import raises
from tests.jobs.clusters import free_port, head_node
from tests.jobs.programs import run_python

_LIMIT_S = 30
_JOIN = (
    "import sys\n"
    "from jobs.entry import run_command\n"
    "from jobs.ray.connection import connect\n"
    "sys.exit(run_command(lambda: connect(sys.argv[1])))"
)
_USE = (
    "import ray\n"
    "from jobs.ray.cluster import cluster\n"
    "from schemas.config import RayConfig\n"
    "with cluster(RayConfig(address='local')):\n"
    "    print(ray.get_runtime_context().get_temp_dir(), ray.get(ray.remote(lambda: 7).remote()))"
)


_INTERRUPTED = """
import os, sys, time, ray
from pathlib import Path
from jobs.entry import run_command
from jobs.ray.cluster import cluster
from schemas.config import RayConfig

def work():
    from pipeline.core.temporary import temporary_folder
    folder = temporary_folder()
    Path(os.environ["STILLROOM_TEST_BEGAN"]).write_text(folder.name)
    time.sleep(600)

def command():
    began = Path(os.environ["STILLROOM_TEST_BEGAN"])
    with cluster(RayConfig(address="local")):
        ray.remote(work).remote()
        while not began.exists() or not began.read_text():
            time.sleep(0.1)
        assert Path(began.read_text()).is_dir()
        raise KeyboardInterrupt

sys.exit(run_command(command))
"""


@pytest.fixture
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.ray.connection.RESPONSE_TIMEOUT_S", 0.5)


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that accepts connections and never responds."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.usefixtures("short_timeout")
@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "[::1]:{}"])
def test_an_address_where_nothing_listens_fails_before_ray_tries_it(form: str) -> None:
    with (
        raises("ray.no-response", ResourceError, exit_code=2) as caught,
        cluster(RayConfig(address=form.format(free_port()))),
    ):
        pass
    assert "refused" in str(caught.value.got)


@pytest.mark.usefixtures("short_timeout")
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_port_that_never_responds_is_no_cluster(scheme: str, silent_port: int) -> None:
    with raises("ray.no-response", ResourceError, where=f"ray.address={scheme}127.0.0.1:{silent_port}"):
        connect(f"{scheme}127.0.0.1:{silent_port}")


@pytest.mark.slow
def test_an_unreachable_address_is_reported_within_half_a_minute() -> None:
    began = time.monotonic()
    with pytest.raises(ResourceError):
        connect(f"127.0.0.1:{free_port()}")
    assert time.monotonic() - began < _LIMIT_S


@pytest.mark.usefixtures("short_timeout")
def test_auto_follows_ray_address_and_checks_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    with raises("ray.no-response", ResourceError):
        connect("auto")


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "cluster", "ray://host", "host:port", "host:6379/x"])
def test_a_malformed_address_is_refused_with_the_config(address: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        Config.model_validate({"ray": {"address": address}})


def _a_file(folder: Path) -> str:
    (folder / "file").touch()
    return str(folder / "file")


@pytest.mark.parametrize(
    ("variable", "code"), [("RAY_TMPDIR", "ray.temp-dir-unwritable"), ("HOME", "ray.token-unwritable")]
)
def test_a_folder_that_ray_cannot_write_is_one_error(variable: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    # Short, or another rule would apply. Not even root can write below a file.
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv(variable, _a_file(Path(folder)))
        with raises(code, ResourceError, exit_code=2) as caught:
            connect("local")
        assert str(caught.value.where).startswith(f"{folder}/file/")
    assert not ray.is_initialized()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.exhaustive
def test_a_temporary_folder_too_long_for_sockets_is_replaced_by_a_short_one_with_a_warning(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    done = run_python("-c", _USE, TMPDIR=str(long))
    folder, result = done.stdout.split()
    assert (done.returncode, result, folder) == (0, "7", f"/tmp/ray-{os.getuid()}")
    assert f"{folder} " in done.stderr
    assert str(long) in done.stderr
    assert list(long.iterdir()) == []


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.exhaustive
def test_a_given_token_makes_a_home_that_cannot_be_written_unnecessary(tmp_path: Path) -> None:
    """The remedy that the error names."""
    done = run_python("-c", _USE, HOME=_a_file(tmp_path), RAY_AUTH_TOKEN="0123456789abcdef" * 4)
    assert (done.returncode, done.stdout.split()[1]) == (0, "7"), done.stderr


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.exhaustive
def test_the_error_of_a_refused_token_names_the_variables_to_set(tmp_path: Path) -> None:
    with head_node(tmp_path, num_cpus=1) as head:
        home = {"HOME": str(tmp_path)}
        for env in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}, {"RAY_AUTH_MODE": "token"}):
            done = run_python("-c", _JOIN, head.address, **{**home, **env})
            assert done.returncode == 2
            assert "RAY_AUTH_TOKEN_PATH" in done.stderr
            assert done.stderr.count("\n") == 4, done.stderr
        assert run_python("-c", _JOIN, head.address, **head.env).returncode == 0


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.exhaustive
def test_ctrl_c_leaves_no_temporary_folder_of_a_worker(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        done = run_python("-c", _INTERRUPTED, TMPDIR=folder, STILLROOM_TEST_BEGAN=str(tmp_path / "began"))
        assert done.returncode == 130, done.stderr
        assert (tmp_path / "began").read_text().startswith(f"{folder}/stillroom-scratch-")
        assert [path.name for path in Path(folder).iterdir() if path.name.startswith("stillroom")] == []
