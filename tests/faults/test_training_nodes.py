"""A training on nodes that are lost and added while it runs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from jobs.index_shards import index_shards
from jobs.train_student import train_student
from pipeline.shards.writer import pack_shards
from schemas.config import Config
from tests.faults.builds import steps_at
from tests.faults.drivers import log_of, start, write
from tests.jobs.clusters import HeadNode, head_with_folder, lose, worker_node
from tests.pipeline.caches import digit_samples
from tests.pipeline.student.runs import metrics, training_error
from tests.waiting import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]
_TIMEOUT_S = 300


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, Counter[str]]]:
    """The folder's URL, and how often each of its files was downloaded as a whole."""
    downloads: Counter[str] = Counter()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def do_GET(self) -> None:
            byte_range = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if byte_range is None:
                downloads[self.path.lstrip("/")] += 1
                super().do_GET()
                return
            data = Path(self.translate_path(self.path)).read_bytes()[int(byte_range[1]) : int(byte_range[2]) + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", downloads
        finally:
            server.shutdown()


def announce_preemption(head: HeadNode) -> None:
    """Drains the node that is not the head, like the handler of a cloud's preemption notice."""
    script = "import ray; ray.init(log_to_driver=False); "
    script += (
        "print(*[n['NodeID'] for n in ray.nodes() if n['Alive'] and 'node:__internal_head__' not in n['Resources']])"
    )
    env = {**head.env, "RAY_ADDRESS": head.address}
    (node_id,) = subprocess.check_output([sys.executable, "-c", script], env=env, text=True).split()
    reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=120"]
    command = [Path(sys.executable).parent / "ray", "drain-node", f"--address={head.address}", f"--node-id={node_id}"]
    subprocess.run([*command, *reason], env=env, check=True, capture_output=True)


def config_of(folder: Path, name: str, shards: str, **ray: Any) -> dict[str, Any]:
    """120 steps of a student without statistics of a batch, so that the losses do not depend on the number of ranks."""
    network = {"model": "python:tests.faults.gated:Gated", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    return {
        "data": {"shards": shards, "index": str(folder / "index"), "num_classes": 10},
        "teacher": {"mode": "none"},
        "views": {"kind": "crop", "size": 16},
        "student": {**network, "kwargs": {"folder": str(folder / name)}},
        "loss": [{"name": "ce"}],
        "train": {"epochs": 24, "global_batch_size": 40, "lr": 0.01, "checkpoint_every_steps": 2},
        "run": {"url": str(folder / name / "run")},
        "ray": ray,
    }


def train_in_one_process(config: dict[str, Any]) -> None:
    checked = Config.model_validate(config)
    assert checked.data.index is not None
    index_shards(checked, checked.data.index)
    train_student(checked)


def worlds(folder: Path) -> list[tuple[str, str]]:
    """The number of ranks and the node of each process that has begun to train."""
    log = folder / "worlds"
    lines = log.read_text().splitlines() if log.exists() else []
    return [(size, Path(node).name) for size, node in map(str.split, lines)]


def losses(folder: Path) -> list[float]:
    records = metrics(folder / "run")
    assert [record["step"] for record in records] == list(range(120))
    return [record["loss"] for record in records]


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_a_training_shrinks_and_grows_with_its_nodes_and_has_the_losses_of_one_process(
    disks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks on two nodes; one node is lost; another one is added. No node downloads a shard twice."""
    head_folder, first_folder, second_folder = (disks / name for name in ("head", "first", "second"))
    cloud, run = (tmp_path / name for name in ("cloud", "nodes"))
    for folder in (cloud, run):
        folder.mkdir()
    pack_shards(digit_samples(200), f"{cloud}/digits-%02d.tar", shard_size=40)

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    with ExitStack() as stack:
        url, downloads = stack.enter_context(served(cloud))
        shards = f"{url}/digits-{{00..04}}.tar"
        train_in_one_process(config_of(tmp_path, "alone", shards, address="none"))
        downloads.clear()
        head = stack.enter_context(head_with_folder(head_folder, monkeypatch))
        first = stack.enter_context(worker_node(head, first_folder))
        ray = {"address": head.address, "num_workers": 2, "min_workers": 1, "max_failures": 4, "resize_every_s": 1}
        config = write(tmp_path / "nodes.yaml", config_of(tmp_path, "nodes", shards, **ray))
        (run / "gate").touch()
        driver = start("train_student", config)
        wait_until(lambda: steps_at(run / "run") >= 2, driver, partial(log_of, config))
        lose(first)
        wait_until(lambda: len(worlds(run)) == 3, driver, partial(log_of, config))
        stack.enter_context(worker_node(head, second_folder))
        wait_until(lambda: len(worlds(run)) == 5, driver, partial(log_of, config))
        (run / "gate").unlink()
        assert driver.wait(_TIMEOUT_S) == 0, log_of(config)

    groups = worlds(run)
    assert sorted(groups[:2]) == [("2", "first"), ("2", "head")]
    assert groups[2] == ("1", "head")
    assert sorted(groups[3:]) == [("2", "head"), ("2", "second")]
    assert "1 of 2 workers run" in log_of(config)
    alone = Config.model_validate(config_of(tmp_path, "alone", shards, address="none"))
    assert losses(run) == pytest.approx(losses(tmp_path / "alone"), rel=training_error(alone, 120))
    copies = [
        path.name for node in (head_folder, first_folder, second_folder) for path in node.glob("stillroom-*/*.tar")
    ]
    # The name of a copy begins with a digest of its source.
    assert Counter(name.partition("-")[2] for name in copies) == downloads
    assert sorted(downloads) == [f"digits-0{number}.tar" for number in range(5)]


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_a_training_saves_a_checkpoint_before_a_preempted_node_is_lost(
    disks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No checkpoint is due before the end of the training."""
    pack_shards(digit_samples(200), f"{tmp_path}/digits-%02d.tar", shard_size=40)
    shards = f"{tmp_path}/digits-{{00..04}}.tar"
    no_checkpoints = {"checkpoint_every_steps": None, "checkpoint_every_epochs": 24}
    run = tmp_path / "nodes"
    run.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    train_in_one_process(config_of(tmp_path, "alone", shards, address="none"))
    with ExitStack() as stack:
        head = stack.enter_context(head_with_folder(disks / "head", monkeypatch))
        first = stack.enter_context(worker_node(head, disks / "first"))
        tree = config_of(tmp_path, "nodes", shards, address=head.address, num_workers=2, wait_s=120, max_failures=4)
        tree["train"] |= no_checkpoints
        config = write(tmp_path / "nodes.yaml", tree)
        (run / "gate").touch()
        driver = start("train_student", config)
        wait_until(lambda: len(worlds(run)) == 2, driver, partial(log_of, config))
        announce_preemption(head)
        wait_until(lambda: steps_at(run / "run") > 0, driver, partial(log_of, config))
        lose(first)
        stack.enter_context(worker_node(head, disks / "second"))
        wait_until(lambda: len(worlds(run)) == 4, driver, partial(log_of, config))
        (run / "gate").unlink()
        assert driver.wait(_TIMEOUT_S) == 0, log_of(config)

    assert "a node will be preempted" in log_of(config)
    alone = Config.model_validate(config_of(tmp_path, "alone", shards, address="none"))
    assert losses(run) == pytest.approx(losses(tmp_path / "alone"), rel=training_error(alone, 120))
