"""Loading small networks, for every test of models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.core.errors import InputError
from pipeline.models import EmbeddingModel, LoadedModel, load_model
from schemas.config import ModelConfig

HALF = (0.5, 0.5, 0.5)
NORMALISED: dict[str, Any] = {"mean": HALF, "std": HALF}
FACTORIES = "python:tests.pipeline.models.factories"
PLAIN = f"{FACTORIES}:Plain"
OPTIONS = ("where", "seed", "allow_new_head")


def load(model: str | None, *, num_classes: int = 7, size: int | None = 64, **keys: Any) -> LoadedModel:
    """Keys of the section and options of ``load_model`` by name."""
    options = {name: keys.pop(name) for name in OPTIONS if name in keys}
    config = ModelConfig.model_validate({"model": model, **keys})
    return load_model(config, widths={"logits": num_classes}, size=size, **options)


def build(model: str, kwargs: dict[str, Any] | None = None) -> EmbeddingModel:
    kwargs = kwargs or {}
    declared = NORMALISED if model.startswith("python:") else {}
    return load(model, kwargs=kwargs, size=kwargs.get("img_size", 64), **declared).module


def head_of(model: EmbeddingModel) -> nn.Linear:
    """The single classifier of a network."""
    (name,) = model.heads
    layer = model.network.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def run(model: nn.Module, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """(logits_BK, embedding_BD) of one forward of an ``EmbeddingModel``, which has no other outputs."""
    outputs = model(images_BCHW)
    assert list(outputs) == ["logits", "embedding"]
    return outputs["logits"], outputs["embedding"]


def refused(model: str | None, **keys: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        load(model, **keys)
    assert caught.value.exit_code == 2
    return caught.value


def images(size: int = 64, rows: int = 3) -> Tensor:
    return torch.rand(rows, 3, size, size, generator=torch.Generator().manual_seed(1))


def millions(network: nn.Module) -> float:
    """Parameters in millions."""
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6
