"""``timm/NAME``: models of the installed timm, never of a hub repository."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from typing import Any

import timm
from timm.data.config import resolve_model_data_config
from timm.layers.classifier import ClassifierHead, ClNormMlpClassifierHead, NormMlpClassifierHead
from torch import nn

from pipeline.core.errors import ModelError
from pipeline.models.segmentation import timm_segmenter
from pipeline.models.sources.base import (
    BuildRequest,
    BuiltModel,
    DeclaredInput,
    constructor_errors,
    download_error,
    refuse_reserved,
    refuse_untrained_head,
    unknown_name,
)
from schemas.config import size_of

# checkpoint_path and the pretrained_cfg family load files that no sha256 covers.
_RESERVED = frozenset(
    {
        "num_classes",
        "pretrained",
        "checkpoint_path",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "pretrained_strict",
        "cache_dir",
    }
)
# HTTP clients of timm's hub package; not all of their errors are OSErrors.
_NETWORK_PACKAGES = frozenset({"httpx", "httpcore", "requests", "urllib3", "huggingface_hub"})

_POOLING_HEADS = (ClassifierHead, NormMlpClassifierHead, ClNormMlpClassifierHead)


def build(request: BuildRequest) -> BuiltModel:
    """Builds a timm model. Its input is that of its pretrained configuration, for any weights.

    Raises:
        ModelError: unknown name or tag, no or unreachable pretrained weights, arguments that do not fit, or no
            classifier whose input is an embedding.
    """
    _check_name(request)
    refuse_reserved(request, _RESERVED | {"features_only"} if request.is_map else _RESERVED)
    if request.pretrained:
        _check_pretrained(request)
    if request.is_map:
        return _segmenter(request)
    with constructor_errors(request):
        network = _create(request)
    width = getattr(network, "head_hidden_size", None)
    stored = getattr(network, "pretrained_cfg", {}).get("num_classes")
    return BuiltModel(
        network=network,
        heads=_heads(network, request) if request.head == "task" else _removed_heads(network, request),
        declared=_declared_input(network, request.config.kwargs),
        size_kwarg="img_size",
        embedding_dim=width if isinstance(width, int) else None,
        has_new_heads=request.pretrained and request.head == "task" and stored != request.num_classes,
    )


def _segmenter(request: BuildRequest) -> BuiltModel:
    """The backbone with a head that has random values, until the caller loads weights of the whole network."""
    with constructor_errors(request), download_errors(request):
        network, notes = timm_segmenter(request)
    cfg = timm.get_pretrained_cfg(request.name)
    config = resolve_model_data_config(network, pretrained_cfg=None if cfg is None else cfg.to_dict())
    return BuiltModel(
        network=network,
        heads=network.heads,
        declared=DeclaredInput(
            size=config["input_size"][-1],
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config["interpolation"],
        ),
        size_kwarg="img_size",
        notes=notes,
        has_new_heads=request.pretrained,
    )


def _create(request: BuildRequest) -> nn.Module:
    # Without the argument, the classifier is that of the published weights.
    width = {} if request.head == "published" else {"num_classes": request.num_classes}
    with download_errors(request):
        return timm.create_model(request.name, pretrained=request.pretrained, **width, **request.config.kwargs)


@contextlib.contextmanager
def download_errors(request: BuildRequest) -> Generator[None]:
    """
    Raises:
        ModelError: pretrained weights cannot be downloaded.
    """
    try:
        yield
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if request.pretrained and (isinstance(error, OSError) or package in _NETWORK_PACKAGES):
            raise download_error(request, error) from error
        raise


def _check_name(request: BuildRequest) -> None:
    if any(mark in request.name for mark in ":/"):
        raise ModelError(
            "hub repositories and folders are not supported, only names of timm",
            code="model.hub-name",
            where=f"{request.where}.model",
            got=request.config.model,
            expected="timm/NAME or timm/NAME.TAG",
            next_step=f"name the architecture, and give the file's URL as {request.where}.weights",
        )
    architecture = request.name.partition(".")[0]
    if not timm.is_model(architecture):
        raise unknown_name(request, timm.list_models())
    try:
        timm.get_pretrained_cfg(request.name)
    except RuntimeError as error:
        raise unknown_name(request, timm.list_pretrained(f"{architecture}*")) from error


def _check_pretrained(request: BuildRequest) -> None:
    pretrained = timm.get_pretrained_cfg(request.name)
    if pretrained is None or not pretrained.has_weights:
        raise ModelError(
            "timm has no pretrained weights for this model",
            code="weights.no-pretrained",
            where=f"{request.where}.weights",
            got=request.config.model,
            next_step="choose a name with weights, or give weights: random or a URL",
        )
    refuse_untrained_head(request, 0 if request.is_map else pretrained.num_classes)


def _heads(network: Any, request: BuildRequest) -> tuple[str, ...]:
    """Names of the classifiers; distilled and multi-scale models have several."""
    get_classifier = getattr(network, "get_classifier", None)
    classifier = None if get_classifier is None else get_classifier()
    parts: Iterable[object] = classifier if isinstance(classifier, tuple | nn.ModuleList) else (classifier,)
    names = {id(module): name for name, module in network.named_modules()}
    # get_classifier of SAM's encoders returns the module around the layer, whose input is a map.
    layers = [part.fc if isinstance(part, _POOLING_HEADS) else part for part in parts]
    # An empty name is the whole network. A list of heads inside of a tuple has no single input.
    if not layers or not all(names.get(id(layer)) and not isinstance(layer, nn.ModuleList) for layer in layers):
        raise _no_single_head(request, None if get_classifier is None else classifier)
    return tuple(names[id(layer)] for layer in layers)


def _removed_heads(network: Any, request: BuildRequest) -> tuple[str, ...]:
    """Names that the classifiers have in weights files, if the network was built without."""
    names = network.pretrained_cfg.get("classifier") or () if request.head == "none" else ()
    return (names,) if isinstance(names, str) else tuple(names)


def _no_single_head(request: BuildRequest, classifier: object) -> ModelError:
    kinds = [type(part).__name__ for part in classifier] if isinstance(classifier, tuple) else type(classifier).__name__
    return ModelError(
        "this network has no classifier whose input is an embedding",
        code="model.no-classifier",
        where=f"{request.where}.model",
        got=f"{request.config.model} has none" if classifier is None else f"{request.config.model} has {kinds}",
        expected="a classifier of one layer, or of several with one input each",
        next_step=f"choose another name, or remove features_only from {request.where}.kwargs",
    )


def _declared_input(network: nn.Module, kwargs: dict[str, Any]) -> DeclaredInput:
    img_size = kwargs.get("img_size")
    config = resolve_model_data_config(network, args={"img_size": img_size} if isinstance(img_size, int) else None)
    return DeclaredInput(
        size=size_of(img_size) if isinstance(img_size, list | tuple) else config["input_size"][-1],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
    )
