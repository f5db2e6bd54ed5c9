"""Networks of task embedding, which have no classifier: what they return is their embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torchvision import models

from pipeline.core.errors import ConfigError, ModelError
from pipeline.models import LoadedModel, load_model
from pipeline.models.summary import check_weights, summarize_model
from schemas.config import StudentConfig, TeacherConfig
from tests.errors import raises
from tests.pipeline.models.factories import Plain, Tower, decorated
from tests.pipeline.models.loading import FACTORIES, NORMALISED, images


def load(model: str, *, size: int | None = 64, where: str = "teacher", **keys: Any) -> LoadedModel:
    kind = StudentConfig if where == "student" else TeacherConfig
    declared = NORMALISED if model.startswith("python:") else {}
    config = kind.model_validate({"model": model, "weights": "random", **declared, **keys})
    return load_model(config, widths={}, size=size, where=where, allow_new_head=where == "student")


def outputs(loaded: LoadedModel) -> dict[str, Tensor]:
    with torch.no_grad():
        return loaded.module(images())


def embedding(loaded: LoadedModel) -> Tensor:
    """The only output."""
    values = outputs(loaded)
    assert list(values) == ["embedding"]
    assert loaded.module.widths == {"embedding": values["embedding"].shape[1]}
    return values["embedding"]


@torch.no_grad()
def test_a_timm_network_returns_what_timm_builds_it_for_without_classes() -> None:
    loaded = load("timm/test_vit", kwargs={"img_size": 64})
    network = timm.create_model("test_vit", num_classes=0, img_size=64).eval()
    network.load_state_dict(loaded.module.network.state_dict())
    assert torch.equal(embedding(loaded), network(images()))


@torch.no_grad()
def test_a_torchvision_network_returns_the_input_of_its_classifier() -> None:
    loaded = load("torchvision/resnet18")
    network = models.resnet18().eval()
    assert network.load_state_dict(loaded.module.network.state_dict(), strict=False).unexpected_keys == []
    inputs: list[Tensor] = []
    network.fc.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    network(images())
    assert torch.equal(embedding(loaded), inputs[0])


@pytest.mark.parametrize(
    ("factory", "width"),
    [("Tower", 6), ("ImageTower", 6), ("decorated", 5)],
    ids=["no classes", "0 classes", "removed"],
)
def test_a_factory_returns_the_network_of_the_embedding(factory: str, width: int) -> None:
    assert embedding(load(f"{FACTORIES}:{factory}")).shape == (3, width)


@torch.no_grad()
def test_a_network_that_defines_its_embedding_has_it_without_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tower, "forward_embedding", lambda self, x: (x.mean(), 2 * self(x)), raising=False)
    loaded = load(f"{FACTORIES}:Tower")
    assert torch.equal(embedding(loaded), 2 * loaded.module.network(images()))


@torch.no_grad()
def test_the_output_of_timms_classifier_may_be_the_embedding() -> None:
    loaded = load("timm/test_vit", kwargs={"img_size": 64}, embedding="output")
    assert torch.equal(embedding(loaded), loaded.module.network(images()))
    assert embedding(loaded).shape == (3, 1000)
    assert loaded.architecture["embedding"] == "output"
    with raises("config.embedding-output", ConfigError):
        load("torchvision/resnet18", embedding="output")


@pytest.mark.parametrize("where", ["teacher", "student"])
def test_the_classifier_in_a_weights_file_is_left_out_and_named(tmp_path: Path, where: str) -> None:
    network = models.resnet18(num_classes=7)
    torch.save(network.state_dict(), tmp_path / "classifier.pt")
    loaded = load("torchvision/resnet18", where=where, weights=str(tmp_path / "classifier.pt"))
    state = loaded.module.network.state_dict()
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in state.items())
    assert any("fc.bias, fc.weight" in note for note in loaded.notes)


def test_the_classifier_that_a_decorated_factory_removes_is_left_out_of_its_weights(tmp_path: Path) -> None:
    network = decorated(7)
    torch.save(network.state_dict(), tmp_path / "classifier.pt")
    loaded = load(f"{FACTORIES}:decorated", weights=str(tmp_path / "classifier.pt"))
    state = loaded.module.network.state_dict()
    left_out = network.state_dict().keys() - state.keys()
    assert len(left_out) == 2
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in state.items())
    assert any(", ".join(sorted(left_out)) in note for note in loaded.notes)


@torch.no_grad()
def test_the_weights_of_a_backbone_initialise_a_classifier(tmp_path: Path) -> None:
    backbone = decorated(0)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pt")
    keys = {"model": f"{FACTORIES}:Plain", "weights": str(tmp_path / "backbone.pt"), **NORMALISED}
    config = StudentConfig.model_validate(keys)
    loaded = load_model(config, widths={"logits": 7}, size=64, where="student", allow_new_head=True)
    assert loaded.random_outputs == {"logits"}
    assert isinstance(loaded.module.network, Plain)
    assert torch.equal(loaded.module(images())["embedding"], backbone(images()))
    with raises("model.untrained-head", ModelError) as caught:
        load_model(TeacherConfig.model_validate(keys), widths={"logits": 7}, size=64)
    assert "data.task=embedding" in str(caught.value.next_step)


@pytest.mark.parametrize(
    "model", ["timm/vit_small_patch14_dinov2", "timm/vit_base_patch16_siglip_224", "timm/eva02_tiny_patch14_224"]
)
def test_a_classification_teacher_without_a_classifier_names_this_task(model: str) -> None:
    config = TeacherConfig.model_validate({"model": model, "weights": "pretrained"})
    with raises("model.untrained-head", ModelError, where="teacher.weights") as caught:
        load_model(config, widths={"logits": 10}, size=None)
    assert "data.task=embedding" in str(caught.value.next_step)


@pytest.mark.parametrize(
    ("model", "kwargs"),
    [("timm/test_vit", {"img_size": 64, "global_pool": ""}), (f"{FACTORIES}:Tower", {"pooled": False})],
)
def test_a_network_that_returns_no_embedding_is_refused(model: str, kwargs: dict[str, Any]) -> None:
    with raises("model.output-shape", ModelError, where="teacher.model"):
        load(model, kwargs=kwargs)


def test_a_text_head_needs_classes() -> None:
    with raises("config.text-head-without-classes", ConfigError, where="teacher.text_head"):
        load("timm/test_vit", text_head="head.safetensors")


@pytest.mark.parametrize(
    ("model", "size", "width"),
    [
        ("timm/vit_small_patch14_dinov2", 518, 384),
        ("timm/vit_small_patch16_dinov3", 256, 384),
        ("timm/vit_base_patch16_siglip_224", 224, 768),
        ("timm/vit_base_patch32_clip_224", 224, 768),
        ("timm/convnext_atto", 224, 320),
        ("torchvision/mobilenet_v3_small", 224, 1024),
    ],
)
def test_known_towers_have_the_published_widths(model: str, size: int, width: int) -> None:
    config = TeacherConfig.model_validate({"model": model, "weights": "random"})
    summary = summarize_model(config, widths={}, size=None, where="teacher")
    assert (summary.embedding_dim, summary.input.size) == (width, size)
    check_weights(config, widths={}, size=None, where="teacher")
