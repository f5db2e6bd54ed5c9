"""What a cluster itself keeps of a job: its logs, and what it tells of trainings."""

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
def test_passwords_and_signatures_are_in_no_log_of_a_cluster_and_in_nothing_that_it_tells(
    shards: list[str], tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    served, kept = tmp_path / "served", tmp_path / "kept"
    for folder in (served, kept):
        folder.mkdir()
    shutil.copy(shards[0], served)
    with guarded(served) as address:
        url = signed(address, Path(shards[0]).name)
        sections = {
            "data": {"shards": url, "val_shards": url},
            "views": {"count": 1},
            "cache": {"url": str(kept / "cache")},
            "train": {"epochs": 1},
            "run": {"url": str(kept / "run")},
            "ray": {"address": "local"},
        }
        assert distill(config_of(tree(**sections)))["steps"] == 1
    state = get_state_actor()
    assert state is not None
    trainings = ray.get(state.get_train_runs.remote())
    told = [run.model_dump_json() for run in trainings.values()]
    assert any("train_loop_config" in run for run in told)
    assert not [run for run in told if SECRET.search(run.encode())]
    logs = Path(global_worker.node.get_session_dir_path(), "logs")
    assert any(logs.iterdir())
    assert with_a_secret(logs) == with_a_secret(kept) == []
