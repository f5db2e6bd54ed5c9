"""An S3 server on loopback, folders with short names, and the end of jobs that a test left running."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from pipeline import storage
from pipeline.shards.writer import pack_shards
from schemas.config import Config
from tests.faults import drivers
from tests.jobs.clusters import free_port
from tests.jobs.conftest import NETWORK
from tests.pipeline.caches import digit_samples

BUCKET = "s3://stillroom-test"


@pytest.fixture(autouse=True)
def no_driver_outlives_its_test() -> Iterator[None]:
    yield
    drivers.end_all()


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An empty bucket; credentials and endpoint come from the environment, as a user gives them."""
    port = free_port()
    log = tmp_path_factory.mktemp("moto") / "log"
    with log.open("wb") as sink, pytest.MonkeyPatch.context() as patch:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=sink, stderr=sink)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-value")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        try:
            _make_bucket()
            yield BUCKET
        finally:
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            server.terminate()
            server.wait()


def _make_bucket() -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            fsspec.filesystem("s3", skip_instance_cache=True).mkdir(BUCKET)
        except OSError:
            assert time.monotonic() < deadline, "the S3 server did not start"
            time.sleep(0.3)
        else:
            return


@pytest.fixture
def s3_config(s3: str, tmp_path: Path) -> Callable[[str], Config]:
    """``s3_config("a")``: a build and a training in the bucket, whose cache is ``a``, from two shards there. Each name
    has another local store, so that a later run downloads all files again.
    """
    for local in pack_shards(digit_samples(48), f"{tmp_path}/digits-%02d.tar", shard_size=24):
        storage.put(Path(local), f"{s3}/shards/{Path(local).name}")

    def config(name: str) -> Config:
        return Config.model_validate(
            {
                "data": {
                    "shards": f"{s3}/shards/digits-{{00..01}}.tar",
                    "num_classes": 10,
                    "cache": f"{s3}/{name}",
                    "local_dir": str(tmp_path / f"node-{name}"),
                },
                "teacher": {**NETWORK, "weights": "random", "batch_size": 8},
                "views": {"kind": "function_matching", "count": 4, "size": 16, "mix_group": 16},
                "cache": {"url": f"{s3}/{name}", "class_means": "eval", "views_per_part": 1},
                "student": NETWORK,
                "loss": [{"name": "kd"}],
                "train": {"epochs": 2, "global_batch_size": 24},
                "run": {"url": f"{s3}/run-{name}"},
                "ray": {"address": "none"},
            }
        )

    return config


@pytest.fixture
def disks() -> Iterator[Path]:
    """A folder for the folders of nodes: in pytest's folder the paths of their sockets would be too long."""
    with tempfile.TemporaryDirectory(prefix="nodes-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
