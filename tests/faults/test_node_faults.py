"""Builds on nodes that come and go, and parts that fail for good on them."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import random
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

from jobs import fan_out as module
from jobs.fan_out import LostTaskError, fan_out
from jobs.verify_cache import verify
from pipeline.cache.commit import read_commits
from pipeline.cache.identity import MAX_DRIFT
from pipeline.cache.reader import open_cache
from pipeline.shards.write import pack_shards
from schemas.config import Config, RayConfig
from tests.faults.drivers import said, start_build, write
from tests.faults.networks import HOLD, LOG, MINE, Held, forwards, held
from tests.faults.test_kills import (
    batches_of_parts,
    committed,
    digest_of,
    traced_file,
    wait_until,
)
from tests.jobs.clusters import Nodes, driver, head_node, many_nodes
from tests.jobs.node_work import attempts, node, take_the_node_along
from tests.pipeline.caches import build, digit_samples, files

pytestmark = [pytest.mark.ray, pytest.mark.slow]
NUM_LOSSES = 6


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head alone; its workers hear of ``LOG``, ``MINE`` and ``HOLD``."""
    folder = tmp_path_factory.mktemp("nodes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
        patch.setenv(LOG, str(folder / "forwards"))
        patch.setenv(MINE, str(folder / "mine"))
        patch.setenv(HOLD, str(folder / "hold"))
        with many_nodes() as (found, _):
            yield found


@pytest.fixture
def config(nodes: Nodes, tmp_path: Path) -> Path:
    """Sixty parts of a build on this cluster, whose teacher can be held."""
    shards = pack_shards(digit_samples(200), f"{tmp_path}/digits-%02d.tar", shard_size=40)
    path = on(nodes, traced_file(tmp_path, "cache", shards), max_retries=2)
    tree = yaml.safe_load(path.read_text())
    tree["teacher"]["model"] = "python:tests.faults.networks:Held"
    return write(path, tree)


def on(nodes: Nodes, path: Path, **ray: object) -> Path:
    tree = yaml.safe_load(path.read_text())
    tree["ray"] = {"address": nodes.address, **ray}
    return write(path, tree)


def alone(path: Path, folder: Path) -> Config:
    """The same build as a plain loop into another folder."""
    tree = yaml.safe_load(path.read_text())
    tree["cache"]["url"], tree["ray"]["address"] = str(folder), "none"
    return Config.model_validate(tree)


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_spot_nodes_that_come_and_go_end_in_the_bytes_of_an_undisturbed_build(
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
        wanted = len(committed(tmp_path / "cache")) + draw.randint(1, 6)
        wait_until(lambda wanted=wanted: len(committed(tmp_path / "cache")) >= wanted, 400)
        hold.touch()
        assert process.poll() is None, said(config)
        # Once the whole fleet is gone.
        for lost in [*fleet] if number == NUM_LOSSES // 2 else [draw.choice(fleet)]:
            fleet.remove(lost)
            nodes.remove(lost, graceful=draw.random() < 0.5)
        done.append(len(committed(tmp_path / "cache")))
        fleet += [nodes.add() for _ in range(2 - len(fleet))]
    hold.unlink()
    assert process.wait(300) == 0, said(config)
    build(alone(config, tmp_path / "undisturbed"))
    whole, broken = files(str(tmp_path / "undisturbed")), files(str(tmp_path / "cache"))
    retried = [line for line in said(config).splitlines() if "retried" in line]
    print(f"\n{NUM_LOSSES + 1} nodes lost at {done} of 60 parts; {retried}")
    print(f"undisturbed {digest_of(whole)}\nspot nodes  {digest_of(broken)}")
    assert broken == whole
    for lost in fleet:
        nodes.remove(lost)


def test_a_part_that_fails_for_good_is_named_the_others_finish_and_a_rerun_does_only_that_one(
    nodes: Nodes, tmp_path: Path
) -> None:
    samples = list(digit_samples(32))
    white = io.BytesIO()
    Image.new("RGB", (20, 20), "white").save(white, "PNG")
    samples[12] = ("white", {"png": white.getvalue(), "cls": b"1"})
    shards = pack_shards(samples, f"{tmp_path}/digits-%02d.tar", shard_size=8)
    config = on(nodes, traced_file(tmp_path, "cache", shards), max_retries=1)
    tree = yaml.safe_load(config.read_text())
    tree["teacher"]["model"] = "python:tests.faults.networks:Mined"
    # One part a shard.
    tree["views"] = {"kind": "crop", "count": 2, "size": 16}
    tree["cache"]["class_means"] = "none"
    write(config, tree)
    mine = Path(os.environ[MINE])
    mine.touch()
    one = nodes.add(num_cpus=2)
    assert start_build(config).wait(400) == 1
    assert "a worker did not finish its task" in said(config)
    assert f"where:  {shards[1]}, " in said(config), said(config)
    assert "Traceback" not in said(config)
    cache = tmp_path / "cache"
    assert {path.split("/")[1] for path in committed(cache)} == {"digits-00", "digits-02", "digits-03"}
    mine.unlink()
    before = len(forwards())
    assert start_build(config).wait(400) == 0, said(config)
    again = {*forwards()[before:]}
    asked_for = batches_of_parts(config, tmp_path / "mapped")
    (last,) = (batches for path, batches in asked_for.items() if "digits-01" in path)
    assert last <= again
    assert not again & set().union(*(batches for path, batches in asked_for.items() if "digits-01" not in path))
    nodes.remove(one)


@pytest.mark.exhaustive
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this CPU is of the older kind itself")
def test_nodes_of_two_kinds_build_one_cache_whose_numbers_agree_within_what_is_stated(
    nodes: Nodes, config: Path, tmp_path: Path
) -> None:
    # As on an older CPU, torch and its kernels round otherwise there; it would draw other random weights too.
    older = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    torch.save(Held(10).state_dict(), tmp_path / "teacher.pt")
    tree = yaml.safe_load(config.read_text())
    tree["teacher"]["weights"] = str(tmp_path / "teacher.pt")
    # Two bytes a logit would hide most of it.
    tree["cache"]["logits"] = "fp32"
    write(config, tree)
    fleet, waited = [nodes.add(), nodes.add(env_vars=older)], held()
    process = start_build(config)
    # Each has a part in work before the other has done all.
    wait_until(lambda: (tmp_path / "cache" / "header.json").exists(), 400)
    hold = Path(os.environ[HOLD])
    hold.touch()
    wait_until(lambda: held() == waited + 2, 60)
    hold.unlink()
    assert process.wait(300) == 0, said(config)
    for node_id in fleet:
        nodes.remove(node_id)
    url, here = str(tmp_path / "cache"), str(tmp_path / "here")
    build(alone(config, Path(here)))
    mixed, plain = files(f"{url}/index"), files(f"{here}/index")
    assert len(mixed) == 5
    assert mixed == plain
    kinds = {(commit.shard_id, view.view): commit for commit in read_commits(url) for view in commit.views}
    found, wanted = open_cache(url), open_cache(here)
    drifts: dict[str, list[float]] = {}
    for (shard, view), commit in kinds.items():
        got, want = found.view(shard, view), wanted.view(shard, view)
        for name in ("row_N", "content_hash_N", "box_N4", "flip_N", "mix_row_N", "mix_lambda_N"):
            assert np.array_equal(getattr(got, name), getattr(want, name)), (shard, view, name)
        assert got.pixel_digest == want.pixel_digest
        assert got.logits_NK is not None
        assert want.logits_NK is not None
        drift = float(np.abs(got.logits_NK - want.logits_NK).max() / want.logits_NK.std())
        drifts.setdefault(commit.environment["cpu_capability"], []).append(drift)
    native = torch.backends.cpu.get_cpu_capability()
    assert {*drifts} == {native, "DEFAULT"}
    assert {*drifts[native]} == {0.0}
    assert 0 < max(drifts["DEFAULT"]) < MAX_DRIFT["fp32"]
    print(f"\n{ {kind: len(found) for kind, found in drifts.items()} } views; drift up to {max(drifts['DEFAULT']):.2g}")
    report = verify(url, config=Config.model_validate(yaml.safe_load(config.read_text())), num_rows=10_000)
    assert report.num_problems == 0, report.problems


def _drive(folder: Path, address: str, done: Path) -> None:
    module._BACKOFF_S = 0.1
    keys = RayConfig(address=address, max_retries=1, resources_per_task={"doomed": 1})
    for number, _ in fan_out(partial(take_the_node_along, folder), range(3), keys, what="a part"):
        (done / str(number)).touch()


@pytest.mark.exhaustive
def test_a_part_that_takes_its_node_along_each_time_comes_to_an_end(nodes: Nodes, tmp_path: Path) -> None:
    (tmp_path / "attempts").mkdir()
    (tmp_path / "done").mkdir()
    for _ in range(6):
        nodes.add(resources={"doomed": 1})
    with driver() as pool:
        flown = pool.submit(_drive, tmp_path / "attempts", nodes.address, tmp_path / "done")
        with pytest.raises(LostTaskError, match="NodeDiedError") as caught:
            flown.result(120)
    assert caught.value.where == "0"
    assert Counter(number for number, _ in attempts(tmp_path / "attempts")) == {0: 6, 1: 1, 2: 1}
    assert {path.name for path in (tmp_path / "done").iterdir()} == {"1", "2"}


@pytest.mark.exhaustive
def test_an_autoscaler_starts_from_no_node_what_a_build_and_a_training_ask_for(tmp_path: Path) -> None:
    script = """
import sys
from functools import partial
from jobs.fan_out import fan_out
from jobs.ray_runtime import cluster, require_resources, slots
from schemas.config import RayConfig
from tests.jobs.node_work import node
config, pod = RayConfig(address=sys.argv[1], gpus_per_task=1, wait_s=120), {"CPU": 1.0, "GPU": 1.0}
with cluster(config):
    assert slots(pod) == 0
    assert len(list(fan_out(partial(node, 0), range(2), config, what="a part"))) == 2
    require_resources(pod, num=3, wait_s=120, what="three workers", where="here")
    assert slots(pod) == 3
"""
    resources = {"CPU": 1, "GPU": 1, "object_store_memory": 150 << 20}
    gpu = {"resources": resources, "node_config": {}, "min_workers": 0, "max_workers": 4}
    with head_node(tmp_path, num_cpus=0, node_types={"gpu": gpu}) as head:
        subprocess.run([sys.executable, "-c", script, head.address], env=head.env, check=True, timeout=300)


@pytest.mark.exhaustive
def test_a_task_that_memory_does_not_hold_is_retried_as_often_as_said() -> None:
    # Whatever is in use is too much, so that Ray ends every task soon.
    crowded = {"memory_usage_threshold": 0.0001, "memory_monitor_refresh_ms": 50}
    with many_nodes({"num_cpus": 1}, _system_config=crowded) as (found, (there,)), driver() as pool:
        said = pool.submit(_sleep, found.address).result(120)
    assert f"attempt 1 failed on {platform.node()}:{there[:8]} (OutOfMemoryError)" in said
    assert "tasks were retried: 1 after OutOfMemoryError" in said


def _sleep(address: str) -> str:
    keys = RayConfig(address=address, max_retries=1)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            list(fan_out(partial(node, 600), range(1), keys, what="a part"))
        except LostTaskError as error:
            print(error, file=sys.stderr)
    return said.getvalue()
