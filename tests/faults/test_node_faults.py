"""Builds on nodes that are lost and added, and parts that fail permanently on them."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from jobs.cache_ops import verify
from jobs.ray import task_scheduler
from jobs.ray.fan_out import fan_out
from jobs.ray.task_scheduler import LostTaskError
from pipeline.cache.build.header_claim import MAX_DRIFT
from pipeline.cache.read.reader import open_cache
from pipeline.shards.writer import pack_shards
from schemas.config import Config, RayConfig
from tests.errors import raises
from tests.faults.builds import batches_of_parts, committed, digest_of, edited, local_config, traced_file
from tests.faults.drivers import log_of, start_build
from tests.faults.networks import HOLD, LOG, MINE, Held, forwards, num_waiting
from tests.jobs.clusters import Nodes, driver, head_node, many_nodes
from tests.jobs.node_work import attempts, kill_the_node, node
from tests.pipeline.caches import build, digit_samples, files, read_commits
from tests.waiting import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]
NUM_LOSSES = 6


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head alone; the environment of its workers has ``LOG``, ``MINE`` and ``HOLD``."""
    folder = tmp_path_factory.mktemp("nodes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
        patch.setenv(LOG, str(folder / "forwards"))
        patch.setenv(MINE, str(folder / "mine"))
        patch.setenv(HOLD, str(folder / "hold"))
        with many_nodes() as (nodes, _):
            yield nodes


@pytest.fixture
def config(nodes: Nodes, tmp_path: Path) -> Path:
    """Sixty parts of a build on this cluster, whose teacher can be halted."""
    shards = pack_shards(digit_samples(200), f"{tmp_path}/digits-%02d.tar", shard_size=40)
    teacher = {"model": "python:tests.faults.networks:Held"}
    ray = {"address": nodes.address, "max_retries": 2}
    return edited(traced_file(tmp_path, "cache", shards), teacher=teacher, ray=ray)


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_a_build_on_nodes_that_are_lost_and_added_has_the_bytes_of_an_undisturbed_build(
    nodes: Nodes, config: Path, tmp_path: Path
) -> None:
    draw = random.Random(int(os.environ.get("STILLROOM_TEST_SEED", "7")))
    # A fast machine would finish all parts before the last node is lost.
    hold = Path(os.environ[HOLD])
    fleet = [nodes.add() for _ in range(2)]
    process = start_build(config)
    done: list[int] = []
    for number in range(NUM_LOSSES):
        hold.unlink(missing_ok=True)
        expected = len(committed(tmp_path / "cache")) + draw.randint(1, 6)
        wait_until(lambda expected=expected: len(committed(tmp_path / "cache")) >= expected)
        hold.touch()
        assert process.poll() is None, log_of(config)
        # All nodes are lost once.
        for lost in [*fleet] if number == NUM_LOSSES // 2 else [draw.choice(fleet)]:
            fleet.remove(lost)
            nodes.remove(lost, graceful=draw.random() < 0.5)
        done.append(len(committed(tmp_path / "cache")))
        fleet += [nodes.add() for _ in range(2 - len(fleet))]
    hold.unlink()
    assert process.wait(300) == 0, log_of(config)
    build(local_config(config, tmp_path / "undisturbed"))
    expected_files, disturbed_files = files(str(tmp_path / "undisturbed")), files(str(tmp_path / "cache"))
    retried = [line for line in log_of(config).splitlines() if "retried" in line]
    print(f"\n{NUM_LOSSES + 1} nodes lost at {done} of 60 parts; {retried}")
    print(f"undisturbed {digest_of(expected_files)}\nspot nodes  {digest_of(disturbed_files)}")
    assert disturbed_files == expected_files
    for lost in fleet:
        nodes.remove(lost)


def test_a_part_that_fails_for_good_is_named_the_others_finish_and_a_rerun_builds_only_that_one(
    nodes: Nodes, tmp_path: Path
) -> None:
    samples = list(digit_samples(32))
    white = io.BytesIO()
    Image.new("RGB", (20, 20), "white").save(white, "PNG")
    samples[12] = ("white", {"png": white.getvalue(), "cls": b"1"})
    shards = pack_shards(samples, f"{tmp_path}/digits-%02d.tar", shard_size=8)
    config = edited(
        traced_file(tmp_path, "cache", shards),
        teacher={"model": "python:tests.faults.networks:Mined"},
        # One part a shard.
        views={"kind": "crop", "count": 2, "size": 16},
        cache={"class_means": "none"},
        ray={"address": nodes.address, "max_retries": 1},
    )
    mine = Path(os.environ[MINE])
    mine.touch()
    node_id = nodes.add(num_cpus=2)
    assert start_build(config).wait(400) == 1
    assert "a worker did not finish its task" in log_of(config)
    assert re.search(rf"where: +{re.escape(shards[1])}, ", log_of(config)), log_of(config)
    assert "Traceback" not in log_of(config)
    cache = tmp_path / "cache"
    assert {path.split("/")[1] for path in committed(cache)} == {"digits-00", "digits-02", "digits-03"}
    mine.unlink()
    before = len(forwards())
    assert start_build(config).wait(400) == 0, log_of(config)
    repeated = {*forwards()[before:]}
    batches_by_commit = batches_of_parts(config, tmp_path / "mapped")
    (last,) = (batches for path, batches in batches_by_commit.items() if "digits-01" in path)
    assert last <= repeated
    assert not repeated & set().union(
        *(batches for path, batches in batches_by_commit.items() if "digits-01" not in path)
    )
    nodes.remove(node_id)


@pytest.mark.exhaustive
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this CPU is of the older kind")
def test_nodes_of_two_cpu_kinds_build_one_cache_within_the_stated_drift(
    nodes: Nodes, config: Path, tmp_path: Path
) -> None:
    # As on an older CPU, torch rounds differently. It would also sample other random weights.
    older = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    torch.save(Held(10).state_dict(), tmp_path / "teacher.pt")
    # fp16 would hide most of the difference.
    edited(config, teacher={"weights": str(tmp_path / "teacher.pt")}, cache={"logits": "fp32"})
    fleet, waited = [nodes.add(), nodes.add(env_vars=older)], num_waiting()
    process = start_build(config)
    # Each node has a part in work before the other one has finished all parts.
    wait_until(lambda: (tmp_path / "cache" / "header.json").exists())
    hold = Path(os.environ[HOLD])
    hold.touch()
    wait_until(lambda: num_waiting() == waited + 2, timeout_s=60)
    hold.unlink()
    assert process.wait(300) == 0, log_of(config)
    for node_id in fleet:
        nodes.remove(node_id)
    url, local = str(tmp_path / "cache"), str(tmp_path / "local")
    build(local_config(config, Path(local)))
    mixed, plain = files(f"{url}/index"), files(f"{local}/index")
    assert len(mixed) == 5
    assert mixed == plain
    kinds = {(commit.shard_id, view.view): commit for commit in read_commits(url) for view in commit.views}
    mixed_cache, local_cache = open_cache(url), open_cache(local)
    drifts: dict[str, list[float]] = {}
    for (shard, view), commit in kinds.items():
        got, want = mixed_cache.view(shard, view), local_cache.view(shard, view)
        for name in ("row_N", "content_hash_N", "box_N4", "flip_N", "mix_row_N", "mix_lambda_N"):
            assert np.array_equal(getattr(got, name), getattr(want, name)), (shard, view, name)
        assert got.pixel_digest == want.pixel_digest
        drift = float(np.abs(got.decoded("logits") - want.decoded("logits")).max() / want.decoded("logits").std())
        drifts.setdefault(commit.environment["cpu_capability"], []).append(drift)
    native = torch.backends.cpu.get_cpu_capability()
    assert {*drifts} == {native, "DEFAULT"}
    assert {*drifts[native]} == {0.0}
    assert 0 < max(drifts["DEFAULT"]) < MAX_DRIFT["fp32"]
    print(
        f"\n{ {kind: len(values) for kind, values in drifts.items()} } views; drift up to {max(drifts['DEFAULT']):.2g}"
    )
    report = verify(url, config=Config.model_validate(yaml.safe_load(config.read_text())), num_rows=10_000)
    assert report.num_problems == 0, report.problems


def _drive(folder: Path, address: str, done: Path) -> None:
    task_scheduler.BACKOFF_S = 0.1
    keys = RayConfig(address=address, max_retries=1, resources_per_task={"doomed": 1})
    for number, _ in fan_out(partial(kill_the_node, folder), range(3), keys, what="a part"):
        (done / str(number)).touch()


@pytest.mark.exhaustive
def test_a_part_that_kills_its_node_each_time_fails_for_good(nodes: Nodes, tmp_path: Path) -> None:
    (tmp_path / "attempts").mkdir()
    (tmp_path / "done").mkdir()
    for _ in range(6):
        nodes.add(resources={"doomed": 1})
    with driver() as pool:
        future = pool.submit(_drive, tmp_path / "attempts", nodes.address, tmp_path / "done")
        with raises("ray.task-lost", LostTaskError, where="0") as caught:
            future.result(120)
    assert str(caught.value.got).startswith("NodeDiedError")
    assert Counter(number for number, _ in attempts(tmp_path / "attempts")) == {0: 6, 1: 1, 2: 1}
    assert {path.name for path in (tmp_path / "done").iterdir()} == {"1", "2"}


@pytest.mark.exhaustive
def test_an_autoscaler_starts_the_nodes_of_a_build_and_a_training_from_zero(tmp_path: Path) -> None:
    script = """
import sys
from functools import partial
from jobs.ray.fan_out import fan_out
from jobs.ray.cluster import cluster, num_slots, require_resources
from schemas.config import RayConfig
from tests.jobs.node_work import node
config, pod = RayConfig(address=sys.argv[1], gpus_per_task=1, wait_s=120), {"CPU": 1.0, "GPU": 1.0}
with cluster(config):
    assert num_slots(pod) == 0
    assert len(list(fan_out(partial(node, 0), range(2), config, what="a part"))) == 2
    require_resources(pod, num=3, wait_s=120, what="three workers", where="here")
    assert num_slots(pod) == 3
"""
    resources = {"CPU": 1, "GPU": 1, "object_store_memory": 150 << 20}
    gpu = {"resources": resources, "node_config": {}, "min_workers": 0, "max_workers": 4}
    with head_node(tmp_path, num_cpus=0, node_types={"gpu": gpu}) as head:
        subprocess.run([sys.executable, "-c", script, head.address], env=head.env, check=True, timeout=300)


@pytest.mark.exhaustive
def test_a_task_that_runs_out_of_memory_is_retried_max_retries_times() -> None:
    # Any use exceeds the threshold, so that Ray ends every task soon.
    crowded = {"memory_usage_threshold": 0.0001, "memory_monitor_refresh_ms": 50}
    with many_nodes({"num_cpus": 1}, _system_config=crowded) as (nodes, (node_id,)), driver() as pool:
        log = pool.submit(_sleep, nodes.address).result(120)
    assert f"attempt 1 failed on {platform.node()}:{node_id[:8]} (OutOfMemoryError)" in log
    assert "tasks were retried: 1 after OutOfMemoryError" in log


def _sleep(address: str) -> str:
    keys = RayConfig(address=address, max_retries=1)
    with contextlib.redirect_stderr(io.StringIO()) as log:
        try:
            list(fan_out(partial(node, 600), range(1), keys, what="a part"))
        except LostTaskError as error:
            print(error, file=sys.stderr)
    return log.getvalue()
