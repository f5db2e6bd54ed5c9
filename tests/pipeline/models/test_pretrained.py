"""Pretrained weights through the download of each library, from a cache on disk and without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor
from torchvision import models

from tests.pipeline.models.loading import load, refused

TIMM, TORCHVISION = "timm/test_resnet", "torchvision/squeezenet1_1"
PRETRAINED: dict[str, Any] = {"weights": "pretrained", "num_classes": 1000}


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches and no network: every proxy is a closed port, and the hub client is offline."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def _torchvision_file(folder: Path, name: str) -> Path:
    url = models.get_model_weights(name)["DEFAULT"].url
    path = folder / "hub" / "checkpoints" / url.rsplit("/", 1)[-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture
def published(offline: Path) -> dict[str, dict[str, Tensor]]:
    """The files of both models in the caches of their libraries."""
    timm_state = timm.create_model("test_resnet").state_dict()
    repository = offline / "hub" / f"models--{timm.get_pretrained_cfg('test_resnet').hf_hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    safetensors.torch.save_file(timm_state, snapshot / "model.safetensors")
    torchvision_state = models.get_model("squeezenet1_1").state_dict()
    torch.save(torchvision_state, _torchvision_file(offline, "squeezenet1_1"))
    return {TIMM: timm_state, TORCHVISION: torchvision_state}


@pytest.mark.parametrize("model", [TIMM, TORCHVISION])
def test_pretrained_weights_are_those_in_the_cache_of_the_library(
    published: dict[str, dict[str, Tensor]], model: str
) -> None:
    state = load(model, **PRETRAINED).module.network.state_dict()
    assert state.keys() == published[model].keys()
    assert all(torch.equal(tensor, published[model][name]) for name, tensor in state.items())


@pytest.mark.parametrize(("model", "head"), [(TIMM, "fc"), (TORCHVISION, "classifier.1")])
def test_a_student_gets_the_pretrained_body_and_a_random_head(
    published: dict[str, dict[str, Tensor]], model: str, head: str
) -> None:
    states = [
        load(model, weights="pretrained", allow_new_head=True, where="student", seed=seed).module.network.state_dict()
        for seed in (0, 0, 1)
    ]
    body = [name for name in states[0] if not name.startswith(head)]
    assert len(body) == len(states[0]) - 2
    assert all(torch.equal(states[0][name], published[model][name]) for name in body)
    first, again, other = (state[f"{head}.weight"] for state in states)
    assert len(first) == 7
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("model", [TIMM, TORCHVISION])
@pytest.mark.usefixtures("offline")
def test_a_teacher_never_has_an_untrained_head(model: str) -> None:
    error = refused(model, weights="pretrained")
    assert error.code == "model.untrained-head"
    assert "1000 classes" in str(error.got)
    assert "7 classes" in str(error.expected)


@pytest.mark.parametrize("model", [TIMM, TORCHVISION])
@pytest.mark.usefixtures("offline")
def test_the_error_for_a_failed_download_has_the_cause_and_a_remedy(
    model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    error = refused(model, **PRETRAINED)
    assert error.code == "weights.download-failed"
    assert "give teacher.weights as the URL" in str(error.next_step)
    assert "Error" in str(error.got)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_model_without_published_weights_is_refused() -> None:
    assert refused("timm/test_vit4", **PRETRAINED).code == "weights.no-pretrained"


def test_a_damaged_download_is_refused(offline: Path) -> None:
    _torchvision_file(offline, "squeezenet1_1").write_bytes(b"not a checkpoint")
    assert refused(TORCHVISION, **PRETRAINED).code == "weights.damaged-download"
