"""Networks whose logits are maps: of torchvision, on backbones of timm, and of python: factories."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision import models

from pipeline.models import LoadedModel, load_model
from pipeline.tasks import task_of
from schemas.config import DataConfig, StudentConfig, TeacherModelConfig
from tests.errors import raises
from tests.marks import slow

K, SIZE = 5, (32, 48)
WIDTHS = task_of(DataConfig.model_validate({"task": "segmentation", "num_classes": K})).widths
INPUT = {"mean": [0.5] * 3, "std": [0.25] * 3}
HERE = "python:tests.pipeline.models.test_segmentation:"


class Maps(nn.Module):
    """What it returns in eval mode, and in training mode."""

    def __init__(self, num_classes: int, *outputs: str) -> None:
        super().__init__()
        self.outputs = outputs
        self.stem = nn.Conv2d(3, 6, kernel_size=3, stride=4, padding=1)
        self.last = nn.Conv2d(6, num_classes, kernel_size=1)
        self.aux = nn.Conv2d(6, num_classes, kernel_size=1)

    def forward(self, images_BCHW: Tensor) -> Any:
        features = self.stem(images_BCHW)
        final = self.last(features)
        if self.outputs == ("vector",):
            return final.mean((2, 3))
        if not self.outputs:
            return final
        return {"out": final} | ({"aux": self.aux(features)} if self.training or self.outputs == ("always",) else {})


def plain(num_classes: int) -> Maps:
    return Maps(num_classes)


def with_aux(num_classes: int, when: str = "training") -> Maps:
    return Maps(num_classes, when)


def vector(num_classes: int) -> Maps:
    return Maps(num_classes, "vector")


def other_channels(num_classes: int) -> Maps:
    return Maps(num_classes + 1)


def student(model: str, **keys: Any) -> LoadedModel:
    config = StudentConfig.model_validate({"model": model, "weights": "random", **keys})
    return load_model(config, widths=WIDTHS, size=SIZE, where="student", allow_new_head=True)


def images() -> Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def last_input(loaded: LoadedModel, layer: str) -> list[Tensor]:
    inputs: list[Tensor] = []
    loaded.module.network.get_submodule(layer).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    return inputs


@pytest.mark.parametrize(
    ("model", "keys", "stride", "layer"),
    [
        ("torchvision/lraspp_mobilenet_v3_large", {}, 8, None),
        slow("torchvision/deeplabv3_mobilenet_v3_large", {}, 16, "classifier.4"),
        slow("torchvision/fcn_resnet50", {}, 8, "classifier.4"),
        ("timm/resnet10t", {}, 8, "classifier.4"),
        ("timm/resnet10t", {"kwargs": {"output_stride": 16, "head": "deeplabv3"}}, 16, "classifier.4"),
        (f"{HERE}plain", INPUT, 4, "last"),
        (f"{HERE}with_aux", INPUT, 4, "last"),
        (f"{HERE}with_aux", {**INPUT, "kwargs": {"when": "always"}}, 4, "last"),
    ],
)
def test_logits_are_maps_and_the_embedding_is_the_mean_of_what_the_last_layer_takes(
    model: str, keys: dict[str, Any], stride: int, layer: str | None
) -> None:
    loaded = student(model, **keys)
    inputs = [] if layer is None else last_input(loaded, layer)
    outputs = loaded.module(images())
    assert outputs.keys() == {"logits", "embedding"}
    assert outputs["logits"].shape == (2, K, *(side // stride for side in SIZE))
    if layer is not None:
        torch.testing.assert_close(outputs["embedding"], inputs[0].mean((2, 3)))
    assert loaded.module.widths == {"logits": K, "embedding": outputs["embedding"].shape[1]}
    assert torch.equal(loaded.module.forward_heads(images())["logits"], outputs["logits"])


@pytest.mark.parametrize(
    ("model", "keys", "has_aux"),
    [
        ("timm/resnet10t", {}, False),
        ("timm/resnet10t", {"kwargs": {"aux_head": True}}, True),
        slow("torchvision/fcn_resnet50", {"kwargs": {"aux_loss": True}}, True),
        (f"{HERE}plain", INPUT, False),
        (f"{HERE}with_aux", INPUT, True),
        (f"{HERE}with_aux", {**INPUT, "kwargs": {"when": "always"}}, True),
    ],
)
def test_an_auxiliary_map_is_there_in_training_mode_alone(model: str, keys: dict[str, Any], has_aux: bool) -> None:
    module = student(model, **keys).module
    assert module.has_aux == has_aux
    assert ("aux" in module.train()(images())) == has_aux
    assert "aux" not in module.eval()(images())
    if has_aux:
        aux, logits = (module.train()(images())[name] for name in ("aux", "logits"))
        assert aux.shape == logits.shape


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", slow("deeplabv3_mobilenet_v3_large")])
def test_a_network_of_torchvision_has_its_tensors_and_its_logits_before_upsampling(name: str, tmp_path: Path) -> None:
    """With the weights of a file that has an auxiliary head where the network may have one."""
    aux = {} if name.startswith("lraspp") else {"aux_loss": True}
    torch.manual_seed(0)
    expected = models.get_model(name, weights=None, weights_backbone=None, num_classes=K, **aux).eval()
    save_file(expected.state_dict(), tmp_path / "weights.safetensors")
    config = TeacherModelConfig.model_validate(
        {"model": f"torchvision/{name}", "weights": str(tmp_path / "weights.safetensors")}
    )
    loaded = load_model(config, widths=WIDTHS, size=SIZE)
    assert loaded.module.network.state_dict().keys() == expected.state_dict().keys()
    assert loaded.input.mean == (0.485, 0.456, 0.406)
    logits = loaded.module(images())["logits"]
    torch.testing.assert_close(interpolate(logits, SIZE, mode="bilinear"), expected(images())["out"])
    copied = copy.deepcopy(loaded.module)
    assert torch.equal(copied(images())["logits"], logits)


def test_weights_with_an_auxiliary_head_fit_a_network_without(tmp_path: Path) -> None:
    network = models.get_model("deeplabv3_mobilenet_v3_large", weights=None, weights_backbone=None, aux_loss=True)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    keys = {"weights": str(tmp_path / "weights.safetensors"), "kwargs": {"aux_loss": False}}
    config = StudentConfig.model_validate({"model": "torchvision/deeplabv3_mobilenet_v3_large", **keys})
    widths = task_of(DataConfig.model_validate({"task": "segmentation", "num_classes": 21})).widths
    module = load_model(config, widths=widths, size=SIZE, where="student", allow_new_head=True).module
    assert not module.has_aux


@pytest.mark.parametrize(
    ("model", "keys", "code"),
    [
        ("torchvision/resnet18", {}, "model.unknown-name"),
        ("timm/resnet10t", {"kwargs": {"head": "unet"}}, "model.unknown-map-head"),
        ("timm/resnet10t", {"kwargs": {"features_only": True}}, "config.reserved-kwargs"),
        ("timm/mixer_s16_224", {}, "model.forward-failed"),
        (f"{HERE}vector", INPUT, "model.no-map"),
        (f"{HERE}other_channels", INPUT, "model.no-map-head"),
    ],
)
def test_networks_without_maps_of_logits_are_refused(model: str, keys: dict[str, Any], code: str) -> None:
    with raises(code):
        student(model, **keys)


def test_a_backbone_that_has_another_stride_is_reported() -> None:
    loaded = student("timm/vit_tiny_patch16_224", kwargs={"img_size": list(SIZE)})
    assert loaded.module(images())["logits"].shape == (2, K, 2, 3)
    assert any("output stride of 16" in note for note in loaded.notes)
    assert not student("timm/resnet10t").notes


def test_the_pretrained_backbone_of_timm_is_no_teacher() -> None:
    config = TeacherModelConfig.model_validate({"model": "timm/resnet18", "weights": "pretrained"})
    with raises("model.untrained-head"):
        load_model(config, widths=WIDTHS, size=SIZE)
