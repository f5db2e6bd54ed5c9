"""A summary equals the loaded network, without its memory and without a download."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
from torchvision import models

from pipeline.core.errors import InputError
from pipeline.models import load_model
from pipeline.models.summary import summarize_model
from schemas.config import ModelConfig
from tests.errors import raises
from tests.marks import slow

# Networks of full size.
pytestmark = pytest.mark.long

CIFAR = {"model": "python:pipeline.models.cifar:resnet", "kwargs": {"depth": 20}, "mean": (0, 0, 0), "std": (1, 1, 1)}


def model(**keys: Any) -> ModelConfig:
    return ModelConfig.model_validate(keys)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (model(**CIFAR), 32),
        (model(model="timm/test_vit", kwargs={"img_size": 32}), None),
        (model(model="timm/test_resnet.r160_in1k"), 64),
        (model(model="torchvision/shufflenet_v2_x0_5"), 64),
    ],
    ids=lambda value: str(value.model) if isinstance(value, ModelConfig) else None,
)
def test_a_summary_equals_the_loaded_network(config: ModelConfig, size: int | None) -> None:
    summary = summarize_model(config, widths={"logits": 7}, size=size, where="student")
    loaded = load_model(config, widths={"logits": 7}, size=size, where="student")
    assert summary.num_parameters == sum(parameter.numel() for parameter in loaded.module.network.parameters())
    assert (summary.embedding_dim, summary.input) == (loaded.module.embedding_dim, loaded.input)


def test_a_network_whose_constructor_computes_with_tensors_has_a_summary() -> None:
    before = torch.get_rng_state()
    config = ModelConfig.model_validate({"model": "torchvision/regnet_y_400mf", "weights": "random"})
    summary = summarize_model(config, widths={"logits": 1000}, size=64, where="teacher")
    published = models.RegNet_Y_400MF_Weights.DEFAULT.meta["num_params"]
    assert (summary.num_parameters, summary.embedding_dim) == (published, 440)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "millions", "embedding"),
    [
        # Published: 236.3 (BiT R152x2), 25.5 (BiT R50x1), 196.5 (Swin-L), 4.2 (MobileNetV1).
        slow("timm/resnetv2_152x2_bit.goog_teacher_in21k_ft_in1k", 236.3, 4096),
        ("timm/resnetv2_50x1_bit.goog_distilled_in1k", 25.5, 2048),
        slow("timm/swin_large_patch4_window7_224.ms_in22k_ft_in1k", 196.5, 1536),
        ("timm/mobilenetv1_100.ra4_e3600_r224_in1k", 4.2, 1024),
    ],
)
def test_networks_of_the_recipes_are_those_of_the_papers_and_are_not_downloaded(
    name: str, millions: float, embedding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a summary used the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    summary = summarize_model(
        model(model=name, weights="pretrained"), widths={"logits": 1000}, size=224, where="teacher"
    )
    assert summary.num_parameters / 1e6 == pytest.approx(millions, abs=0.06)
    assert (summary.embedding_dim, summary.input.size) == (embedding, 224)


def test_a_summary_does_not_change_the_global_generator() -> None:
    before = torch.get_rng_state()
    summarize_model(model(**CIFAR), widths={"logits": 10}, size=32, where="student")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("keys", "size", "code"),
    [
        ({**CIFAR, "mean": None}, 32, "config.model-input-missing"),
        ({"model": "timm/resnet19"}, 32, "model.unknown-name"),
        ({"model": "timm/vit_tiny_patch16_224"}, 16, "model.forward-failed"),
    ],
)
def test_a_summary_has_the_errors_of_loading(keys: dict[str, Any], size: int, code: str) -> None:
    with raises(code, InputError):
        summarize_model(model(**keys), widths={"logits": 10}, size=size, where="student")
