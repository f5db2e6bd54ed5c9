"""Pretrained weights through each library's own download, from a cache on disk and without a network."""

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

from pipeline.core.errors import ModelError
from pipeline.models import LoadedModel, load_model
from schemas.config import ModelConfig

TIMM, TORCHVISION = "timm/test_resnet", "torchvision/squeezenet1_1"


def load(model: str, *, num_classes: int = 1000, **options: Any) -> LoadedModel:
    config = ModelConfig.model_validate({"model": model, "weights": "pretrained"})
    return load_model(config, num_classes=num_classes, size=64, **options)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches and no way out: every proxy is a closed port, and the hub client is told that it is offline."""
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
    """Both models' files where each library keeps what it has downloaded."""
    ours = timm.create_model("test_resnet").state_dict()
    repository = offline / "hub" / f"models--{timm.get_pretrained_cfg('test_resnet').hf_hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    safetensors.torch.save_file(ours, snapshot / "model.safetensors")
    theirs = models.get_model("squeezenet1_1").state_dict()
    torch.save(theirs, _torchvision_file(offline, "squeezenet1_1"))
    return {TIMM: ours, TORCHVISION: theirs}


@pytest.mark.parametrize("model", [TIMM, TORCHVISION])
def test_pretrained_weights_are_those_that_the_library_keeps(
    published: dict[str, dict[str, Tensor]], model: str
) -> None:
    state = load(model).module.network.state_dict()
    assert state.keys() == published[model].keys()
    assert all(torch.equal(tensor, published[model][name]) for name, tensor in state.items())


@pytest.mark.parametrize(("model", "head"), [(TIMM, "fc"), (TORCHVISION, "classifier.1")])
def test_a_student_takes_the_body_and_draws_a_new_head(
    published: dict[str, dict[str, Tensor]], model: str, head: str
) -> None:
    states = [
        load(model, num_classes=7, allow_new_head=True, where="student", seed=seed).module.network.state_dict()
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
def test_a_teacher_never_speaks_with_an_untrained_head(model: str) -> None:
    with pytest.raises(ModelError, match="untrained head") as caught:
        load(model, num_classes=7)
    assert "1000 classes" in str(caught.value)
    assert "7 classes" in str(caught.value)


@pytest.mark.parametrize("model", [TIMM, TORCHVISION])
@pytest.mark.usefixtures("offline")
def test_a_failed_download_names_the_cause_and_the_way_round(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError, match="could not be downloaded") as caught:
        load(model)
    assert "give teacher.weights as the URL" in str(caught.value)
    assert "Error" in str(caught.value.got)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_model_without_published_weights_is_not_loaded_at_random() -> None:
    with pytest.raises(ModelError, match="no pretrained weights"):
        load("timm/test_vit4")


def test_a_damaged_download_says_where_it_lies(offline: Path) -> None:
    _torchvision_file(offline, "squeezenet1_1").write_bytes(b"not a checkpoint")
    with pytest.raises(ModelError, match="damaged or not plain tensors"):
        load(TORCHVISION)
