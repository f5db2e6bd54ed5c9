"""Data of a job that a cluster stores: its logs, and its records of trainings."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import ray
from ray._private.worker import global_worker
from ray.train.v2._internal.state.state_actor import get_state_actor

from jobs.distill import distill
from tests.jobs.conftest import Tree, config_of
from tests.security.guarded_http import SECRET, guarded, signed
from tests.security.test_commands import with_a_secret

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.usefixtures("ray_cluster")
def test_passwords_and_signatures_are_in_no_log_and_no_record_of_a_cluster(
    shards: list[str], tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    served, outputs = tmp_path / "served", tmp_path / "outputs"
    for folder in (served, outputs):
        folder.mkdir()
    shutil.copy(shards[0], served)
    with guarded(served) as address:
        url = signed(address, Path(shards[0]).name)
        sections = {
            "data": {"shards": url, "val_shards": url},
            "views": {"count": 1},
            "cache": {"url": str(outputs / "cache")},
            "train": {"epochs": 1},
            "run": {"url": str(outputs / "run")},
            "ray": {"address": "local"},
        }
        assert distill(config_of(tree(**sections)))["steps"] == 1
    state = get_state_actor()
    assert state is not None
    trainings = ray.get(state.get_train_runs.remote())
    records = [run.model_dump_json() for run in trainings.values()]
    assert any("train_loop_config" in run for run in records)
    assert not [run for run in records if SECRET.search(run.encode())]
    logs = Path(global_worker.node.get_session_dir_path(), "logs")
    assert any(logs.iterdir())
    assert with_a_secret(logs) == with_a_secret(outputs) == []
