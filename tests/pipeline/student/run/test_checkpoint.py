"""A run's folder: claimed once, files replaced as a whole, read without running code."""

from __future__ import annotations

import json
import pickle
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core.hashing import seal
from pipeline.student.run import checkpoint
from schemas.config import Config, TrainConfig
from tests.errors import raises


def config(**sections: Any) -> Config:
    return Config.model_validate({"run": {"url": "anywhere"}, **sections})


def test_keys_that_change_the_computation_may_not_change(tmp_path: Path) -> None:
    url = str(tmp_path)
    checkpoint.claim_run(url, config())
    with raises("run.other-config", got="data.num_classes: None -> 7; train.epochs: 1 -> 3; train.lr: 0.001 -> 0.5"):
        checkpoint.claim_run(url, config(train={"lr": 0.5, "epochs": 3}, data={"num_classes": 7}))


@pytest.mark.parametrize(
    "sections",
    [
        {"ray": {"num_workers": 4, "cpus_per_worker": 2, "max_failures": 3}},
        {"run": {"url": "elsewhere"}},
        {"train": {"num_workers": 8, "checkpoint_every_epochs": 5}},
    ],
    ids=str,
)
def test_keys_of_place_and_speed_may_change(tmp_path: Path, sections: dict[str, Any]) -> None:
    checkpoint.claim_run(str(tmp_path), config())
    checkpoint.claim_run(str(tmp_path), config(**sections))
    assert checkpoint.read_config(str(tmp_path)) == config()


def test_a_key_that_was_not_set_stays_so_and_equals_its_default(tmp_path: Path) -> None:
    losses = [{"name": "kd", "temperature": 4.0}, {"name": "ce", "weight": 0.5}]
    plain = config(data={"cache": "c"}, student={"model": "timm/resnet18"}, loss=losses)
    checkpoint.claim_run(str(tmp_path), plain)
    found = checkpoint.read_config(str(tmp_path))
    assert found == plain
    assert found.data.model_fields_set == {"cache"}
    assert found.views.model_fields_set == set()
    # Keys set to their defaults make no other run.
    complete = plain.model_dump(mode="json")
    checkpoint.claim_run(str(tmp_path), Config.model_validate(complete))
    with raises("run.other-config", got="data.label: cls -> None"):
        checkpoint.claim_run(str(tmp_path), Config.model_validate(complete | {"data": {"cache": "c", "label": None}}))


def test_the_stored_config_names_every_key_so_that_a_later_default_changes_no_run(tmp_path: Path) -> None:
    checkpoint.claim_run(str(tmp_path), config())
    stored = json.loads((tmp_path / checkpoint.CONFIG).read_text())
    assert stored["train"].keys() == TrainConfig.model_fields.keys()
    # As if the default had been another when the run began.
    del stored["digest"]
    stored["train"]["lr"] = 0.25
    (tmp_path / checkpoint.CONFIG).write_bytes(seal(stored))
    assert checkpoint.read_config(str(tmp_path)).train.lr == 0.25
    with raises("run.other-config", got="train.lr: 0.25 -> 0.001"):
        checkpoint.check_same_config(str(tmp_path), config())


def test_a_run_with_the_old_default_of_teacher_weights_continues(tmp_path: Path) -> None:
    teacher = {"model": "timm/resnet18", "mode": "cache"}
    old = config(teacher={**teacher, "weights": "random", "others": [{"weights": "random"}]})
    checkpoint.claim_run(str(tmp_path), old)
    checkpoint.check_same_config(str(tmp_path), config(teacher={**teacher, "others": [{}]}))
    with raises("run.other-config", got="teacher.weights: random -> pretrained"):
        checkpoint.check_same_config(
            str(tmp_path), config(teacher={**teacher, "weights": "pretrained", "others": [{}]})
        )


def test_credentials_of_urls_are_not_written_and_make_no_other_run(tmp_path: Path) -> None:
    for secret in ("HUSH1", "HUSH2"):
        url = f"https://user:{secret}@host/a.tar?sig={secret}"
        checkpoint.claim_run(str(tmp_path), config(data={"shards": [url]}, teacher={"kwargs": {"a": {"b": [url]}}}))
        assert secret.encode() not in (tmp_path / checkpoint.CONFIG).read_bytes()
    with raises("run.other-config") as caught:
        checkpoint.claim_run(str(tmp_path), config(data={"shards": ["https://host/b.tar"]}))
    assert "data.shards" in str(caught.value.got)


def test_a_folder_without_a_run_has_no_config(tmp_path: Path) -> None:
    checkpoint.check_same_config(str(tmp_path), config())
    with raises("run.not-found"):
        checkpoint.read_config(str(tmp_path))


def test_a_config_that_was_edited_in_the_run_is_refused(tmp_path: Path) -> None:
    checkpoint.claim_run(str(tmp_path), config())
    file = tmp_path / checkpoint.CONFIG
    file.write_bytes(file.read_bytes().replace(b'"epochs":1', b'"epochs":2'))
    with raises("cache.record-changed"):
        checkpoint.read_config(str(tmp_path))


def test_the_first_pinned_manifest_is_used_by_all(tmp_path: Path) -> None:
    url = str(tmp_path)
    assert checkpoint.pinned_manifests(url, 2) == (None, None)
    assert checkpoint.pin_manifests(url, [b"first", b"other"]) == (b"first", b"other")
    assert checkpoint.pin_manifests(url, [b"second", b"other"]) == (b"first", b"other")
    assert checkpoint.pinned_manifests(url, 2) == (b"first", b"other")


def test_one_cache_is_pinned_by_the_same_name_as_the_first_of_several(tmp_path: Path) -> None:
    checkpoint.pin_manifests(str(tmp_path), [b"first"])
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert checkpoint.pinned_manifests(str(tmp_path), 2) == (b"first", None)


class Marker:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    pickle.loads(pickle.dumps(Marker(trap)))
    assert trap.exists()
    trap.unlink()
    (tmp_path / "checkpoints").mkdir()
    torch.save({"model": Marker(trap)}, tmp_path / checkpoint.LAST)
    with raises("run.damaged-checkpoint"):
        checkpoint.load(str(tmp_path), checkpoint.LAST)
    assert not trap.exists()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, share: float) -> None:
    checkpoint.save(str(tmp_path), checkpoint.LAST, {"model": {"weight": torch.zeros(100)}})
    file = tmp_path / checkpoint.LAST
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with raises("run.damaged-checkpoint", where=str(file)):
        checkpoint.load(str(tmp_path), checkpoint.LAST)


def test_a_run_is_finished_once_it_has_a_summary(tmp_path: Path) -> None:
    assert checkpoint.read_summary(str(tmp_path)) is None
    checkpoint.write_summary(str(tmp_path), {"steps": 5, "top1": None})
    assert checkpoint.read_summary(str(tmp_path)) == {"steps": 5, "top1": None}


def test_a_corrected_config_can_begin_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    run = str(tmp_path / "a run")
    checkpoint.claim_run(run, config())
    checkpoint.pin_manifests(run, [b"one", b"two"])
    corrected = config(train={"lr": 0.5})
    with raises("run.other-config") as caught:
        checkpoint.check_same_config(run, corrected)
    assert "no checkpoint is saved" in caught.value.what
    # The suggested command works.
    command = re.search(r"run: (rm .*), and then", str(caught.value.next_step))
    assert command is not None
    subprocess.run(shlex.split(command[1]), check=True)
    assert not list(Path(run).iterdir())
    checkpoint.claim_run(run, corrected)
    checkpoint.save(run, checkpoint.LAST, {"step": 1})
    with raises("run.other-config") as caught:
        checkpoint.check_same_config(run, config())
    assert "rm " not in str(caught.value.next_step)
    assert "no checkpoint" not in caught.value.what
