"""``torchvision/NAME``: the classification models of the installed torchvision."""

from __future__ import annotations

import pickle
from typing import Any

from torch import nn
from torchvision import models

from pipeline.errors import ModelError
from pipeline.models.source import (
    Built,
    OwnInput,
    Request,
    building,
    cause,
    last_layer,
    no_download,
    refuse_reserved,
    refuse_untrained_head,
    unknown_name,
)

_RESERVED = frozenset({"num_classes", "weights", "progress", "pretrained"})
# Their auxiliary heads answer in training alone: no loss here reads them, and DDP waits for their gradients.
_WITH_AUXILIARY_HEADS = frozenset({"googlenet", "inception_v3"})


def build(request: Request) -> Built:
    """Builds a torchvision classifier; its input comes from its default weights' transforms, whatever weights it gets.

    Raises:
        ModelError: unknown name, unreachable pretrained weights, or arguments that do not fit.
    """
    names = models.list_models(module=models)
    if request.name not in names:
        raise unknown_name(request, names)
    refuse_reserved(request, _RESERVED)
    published = models.get_model_weights(request.name)["DEFAULT"]
    with building(request):
        network = _pretrained(request, published) if request.pretrained else _untrained(request)
    return Built(network=network, heads=(_head(network),), own=_own_input(network, published), size_kwarg="image_size")


def _untrained(request: Request) -> nn.Module:
    kwargs = dict(request.config.kwargs)
    if request.name in _WITH_AUXILIARY_HEADS:
        kwargs = {"aux_logits": False, "init_weights": True, **kwargs}
    return models.get_model(request.name, weights=None, num_classes=request.num_classes, **kwargs)


def _pretrained(request: Request, published: models.WeightsEnum) -> nn.Module:
    head_width = len(published.meta["categories"])
    refuse_untrained_head(request, head_width)
    _download(request, published)
    kwargs = dict(request.config.kwargs)
    if request.name in _WITH_AUXILIARY_HEADS:
        kwargs = {"aux_logits": False, **kwargs}
    network = models.get_model(request.name, weights=published, progress=False, **kwargs)
    if head_width != request.num_classes:
        _replace_head(network, request.num_classes)
    return network


def _download(request: Request, published: models.WeightsEnum) -> None:
    """Fetches the file into torchvision's cache and reads it once with pickled code refused.

    The library's own loader does not refuse it, and only from here can a failed download be told from bad arguments.
    """
    try:
        published.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
    except OSError as error:
        raise no_download(request, error) from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ModelError(
            f"the downloaded weights of {request.config.model} are damaged or not plain tensors",
            where=f"{request.where}.weights",
            got=cause(error),
            next_step="remove the file from torch's hub cache and try again",
        ) from error


def _head(network: nn.Module) -> str:
    """The last nn.Linear; SqueezeNet alone has none and classifies by its last convolution."""
    name = last_layer(network, nn.Linear) or last_layer(network, nn.Conv2d)
    assert name is not None, "every torchvision classifier ends in one or the other"
    return name


def _replace_head(network: nn.Module, num_classes: int) -> None:
    name = _head(network)
    old = network.get_submodule(name)
    if isinstance(old, nn.Conv2d):
        new: nn.Module = nn.Conv2d(old.in_channels, num_classes, kernel_size=1)
    else:
        assert isinstance(old, nn.Linear)
        new = nn.Linear(old.in_features, num_classes)
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, new)


def _own_input(network: nn.Module, published: models.WeightsEnum) -> OwnInput:
    preset: Any = published.transforms()
    # A ViT is built for one size, which need not be the one its published weights were made for.
    built_for = getattr(network, "image_size", None)
    return OwnInput(
        size=built_for if isinstance(built_for, int) else preset.crop_size[0],
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
    )
