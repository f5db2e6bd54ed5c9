"""``torchvision/NAME``: the classification and segmentation models of the installed torchvision."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

from torch import Tensor, nn
from torchvision import models

from pipeline.core.errors import ModelError, cause
from pipeline.models.segmentation import Segmenter, replace_heads, torchvision_segmenter
from pipeline.models.sources.base import (
    BuildRequest,
    BuiltModel,
    DeclaredInput,
    WeightsFile,
    constructor_errors,
    download_error,
    last_layer,
    refuse_reserved,
    refuse_untrained_head,
    unknown_name,
)
from pipeline.models.weights import load_state

_RESERVED = frozenset({"num_classes", "weights", "progress", "pretrained"})
# Auxiliary heads have outputs in training mode only. No loss uses them, and DDP would wait for their gradients.
_WITH_AUXILIARY_HEADS = frozenset({"googlenet", "inception_v3"})
_AUXILIARY_CLASSIFIER = "aux_classifier."
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
# As in torchvision's loader of its DenseNets, whose files have dots in module names.
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)$")


def build(request: BuildRequest) -> BuiltModel:
    """Builds a torchvision classifier, or a segmentation network, whose input is that of the transforms of its default
    weights, for any weights.

    The same weights by name and by URL give the same network.

    Raises:
        ModelError: unknown name, unreachable pretrained weights, or arguments that do not fit.
    """
    names = models.list_models(module=models.segmentation if request.is_map else models)
    if request.name not in names:
        raise unknown_name(request, names)
    refuse_reserved(request, _RESERVED | {"weights_backbone"} if request.is_map else _RESERVED)
    published = models.get_model_weights(request.name)["DEFAULT"]
    # A network without a classifier is built with that of the published weights, which is then removed.
    width = len(published.meta["categories"]) if request.head == "none" else request.num_classes
    if request.pretrained:
        width = len(published.meta["categories"])
        refuse_untrained_head(request, width)
        file: WeightsFile | None = WeightsFile(_download(request, published), transform_input=True)
    else:
        file = None if request.read is None else request.read()
    has_new_head = request.pretrained and request.head == "task" and width != request.num_classes
    kwargs, notes = _arguments(request, published, file)
    with constructor_errors(request):
        network = (
            torchvision_segmenter(request.name, width, **kwargs)
            if request.is_map
            else models.get_model(request.name, weights=None, num_classes=width, **kwargs)
        )
    network.register_load_state_dict_pre_hook(_fix_legacy_names)
    if request.pretrained and file is not None:
        load_state(network, file.state, source=str(published), where=f"{request.where}.weights")
    if isinstance(network, Segmenter):
        if has_new_head:
            replace_heads(network, request.num_classes)
        return BuiltModel(
            network=network,
            heads=network.heads,
            declared=_declared_input(network, published),
            notes=notes,
            has_new_heads=has_new_head,
        )
    if has_new_head:
        _replace_head(network, _new_head(network, request.num_classes))
    head = _head(network)
    if request.head == "none":
        _replace_head(network, nn.Identity())
    return BuiltModel(
        network=network,
        heads=(head,),
        declared=_declared_input(network, published),
        size_kwarg="image_size",
        notes=notes,
        has_new_heads=has_new_head,
    )


def input_transform(network: nn.Module) -> dict[str, bool]:
    """``transform_input`` of a GoogLeNet or Inception, to be stored with its tensors; empty for other networks.

    With it these networks first convert an input that is normalised for ImageNet to mean and std 0.5.
    """
    transforms = getattr(network, "transform_input", None)
    return {"transform_input": transforms} if isinstance(transforms, bool) else {}


def _arguments(
    request: BuildRequest, published: models.WeightsEnum, file: WeightsFile | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Arguments of the constructor, as torchvision's builder sets them for weights, and notes for the user.

    ``kwargs`` of the user override them.
    """
    chosen: dict[str, Any] = {}
    notes: list[str] = []
    if request.name in _WITH_AUXILIARY_HEADS:
        chosen = {"aux_logits": False, "init_weights": file is None, "transform_input": False}
    if file is not None and request.name in _WITH_AUXILIARY_HEADS:
        chosen["transform_input"] = file.transform_input is not False
        if file.transform_input is None and "transform_input" not in request.config.kwargs:
            notes.append(
                f"{request.where}.kwargs: transform_input is true, as torchvision sets it for {request.name} with "
                "weights; set {transform_input: false} for weights that were trained without it"
            )
        auxiliary = [name for name in file.state if _is_auxiliary(name)]
        if auxiliary and not request.config.kwargs.get("aux_logits") and not request.pretrained:
            notes.append(f"{request.where}.weights: {len(auxiliary)} tensors of auxiliary heads are left out")
    elif file is not None and request.is_map:
        # The weights of the library have one, which a student may not need.
        chosen["aux_loss"] = any(name.startswith(_AUXILIARY_CLASSIFIER) for name in file.state)
    elif request.name.startswith("vit_") and (image_size := _image_size(request, published, file)) is not None:
        chosen["image_size"] = image_size
    return {**chosen, **request.config.kwargs}, tuple(notes)


def _image_size(request: BuildRequest, published: models.WeightsEnum, file: WeightsFile | None) -> int | None:
    """The input size of a ViT's position embedding [1,1+N,D], in pixels; None for the default of the constructor."""
    if file is None:
        if request.config.weights == "pretrained":
            return published.meta["min_size"][0]
        # Its ViTs take squares alone.
        return request.likely_size if isinstance(request.likely_size, int) else None
    positions = [tensor for name, tensor in file.state.items() if name.endswith("encoder.pos_embedding")]
    patches = [tensor for name, tensor in file.state.items() if name.endswith("conv_proj.weight")]
    if len(positions) != 1 or len(patches) != 1 or positions[0].ndim != 3 or patches[0].ndim != 4:
        return None
    return isqrt(positions[0].shape[1] - 1) * patches[0].shape[-1]


def _is_auxiliary(name: str) -> bool:
    return any(name.startswith(head) or f".{head}" in name for head in _AUXILIARY)


def _fix_legacy_names(
    network: nn.Module, state: dict[str, Any], _prefix: str, _metadata: object, _strict: bool, *_errors: list[str]
) -> None:
    """Hook before loading a state dict: renames tensors of old DenseNets, drops those of missing auxiliary heads."""
    missing = _AUXILIARY if getattr(network, "aux_logits", None) is False else ()
    if getattr(network, "aux_classifier", network) is None:
        missing = _AUXILIARY_CLASSIFIER
    for name in list(state):
        old = _OLD_DENSENET.match(name)
        if old:
            state["".join(old.groups())] = state.pop(name)
        elif name.startswith(missing):
            del state[name]


def _download(request: BuildRequest, published: models.WeightsEnum) -> Mapping[str, Tensor]:
    """Downloads the file into torchvision's cache and reads it without pickled code.

    The loader of the library would run such code, and would not separate a failed download from bad arguments.
    """
    try:
        return published.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
    except OSError as error:
        raise download_error(request, error) from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ModelError(
            f"the downloaded weights of {request.config.model} are damaged or not plain tensors",
            code="weights.damaged-download",
            where=f"{request.where}.weights",
            got=cause(error),
            next_step="remove the file from torch's hub cache and try again",
        ) from error


def _head(network: nn.Module) -> str:
    """The last nn.Linear; SqueezeNet has none and classifies by its last convolution."""
    name = last_layer(network, nn.Linear) or last_layer(network, nn.Conv2d)
    assert name is not None, "every torchvision classifier ends in one or the other"
    return name


def _new_head(network: nn.Module, num_classes: int) -> nn.Module:
    old = network.get_submodule(_head(network))
    if isinstance(old, nn.Conv2d):
        return nn.Conv2d(old.in_channels, num_classes, kernel_size=1)
    assert isinstance(old, nn.Linear)
    return nn.Linear(old.in_features, num_classes)


def _replace_head(network: nn.Module, new: nn.Module) -> None:
    parent, _, leaf = _head(network).rpartition(".")
    setattr(network.get_submodule(parent), leaf, new)


def _declared_input(network: nn.Module, published: models.WeightsEnum) -> DeclaredInput:
    preset: Any = published.transforms()
    # The size of a ViT is fixed when it is built, and may differ from that of its published weights.
    built_for = getattr(network, "image_size", None)
    return DeclaredInput(
        size=built_for if isinstance(built_for, int) else getattr(preset, "crop_size", preset.resize_size)[0],
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
    )
