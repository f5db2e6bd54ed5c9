"""``python:module:factory``: a network of the user, built by ``factory(num_classes=K, **kwargs) -> nn.Module``.

With several heads, ``num_classes`` maps their names to their K, and the forward of the network returns a dict by name.
With task segmentation the forward returns logits [B,K,h,w], or a dict with these as "out" and perhaps "aux".
Without heads (task embedding) it is 0, if the factory takes it, and the forward returns the embedding [B,D].

A config names code and does not contain it: modules come from Python's import path, which in a submitted job is its
working directory and the installed packages. Nothing here extends that path.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from pipeline.core.errors import ModelError, cause
from pipeline.models.sources.base import (
    BuildRequest,
    BuiltModel,
    DeclaredInput,
    constructor_errors,
    last_layer,
    refuse_reserved,
)

_NAME = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*")
# Not code of the user. Some of their functions execute what their arguments name: a command, a file, a repository.
_FOREIGN_PACKAGES = frozenset({*sys.stdlib_module_names, "torch", "torchvision", "timm"})


def build(request: BuildRequest) -> BuiltModel:
    """Builds with the factory of the user. Such a network declares no input, so the YAML must.

    Raises:
        ModelError: the factory cannot be imported or called, or it does not return a network with a linear head.
    """
    refuse_reserved(request, {"num_classes"})
    if request.pretrained:
        raise ModelError(
            "a python: factory has no pretrained weights to download",
            code="weights.no-pretrained",
            where=f"{request.where}.weights",
            got="pretrained",
            expected="random, or the URL of a .safetensors or .pt file",
        )
    factory = _import_factory(request)
    with constructor_errors(request):
        classes = request.classes_by_head if request.has_several_heads else request.num_classes
        arguments = {"num_classes": classes} if request.widths or _takes_classes(factory) else {}
        network = factory(**arguments, **request.config.kwargs)
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"{request.config.model} did not return a network",
            code="model.not-a-network",
            where=f"{request.where}.model",
            got=type(network).__name__,
            expected="torch.nn.Module",
        )
    # ``multi_head`` names the classifier that it removed.
    heads = _heads(network, request) if request.head == "task" else tuple(getattr(network, "removed", ()))
    return BuiltModel(network=network, heads=heads, declared=DeclaredInput())


def _import_factory(request: BuildRequest) -> Callable[..., Any]:
    _check_name(request)
    module_name, _, attribute = request.name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # code of the user may raise anything while it is imported
        raise ModelError(
            "this factory cannot be imported",
            code="model.factory-import",
            where=f"{request.where}.model",
            got=f"{request.config.model}: {cause(error)}",
            expected="python:package.module:factory",
            next_step="correct the name; install the package, put its folder on PYTHONPATH, or submit it with the job",
        ) from error
    if not callable(factory):
        raise ModelError(
            "this factory cannot be called",
            code="model.factory-not-callable",
            where=f"{request.where}.model",
            got=f"{request.config.model} is a {type(factory).__name__}",
            expected="factory(num_classes=…, **kwargs) -> torch.nn.Module",
        )
    _check_origin(factory, request)
    return factory


def _takes_classes(factory: Callable[..., Any]) -> bool:
    """Whether it may be called with ``num_classes``. A network without a classifier need not depend on it."""
    parameters = inspect.signature(factory).parameters
    return "num_classes" in parameters or any(item.kind is item.VAR_KEYWORD for item in parameters.values())


def _check_name(request: BuildRequest) -> None:
    if _NAME.fullmatch(request.name) is None:
        raise ModelError(
            "this is not the name of a factory",
            code="model.factory-name",
            where=f"{request.where}.model",
            got=request.config.model,
            expected="python:package.module:factory, with names only",
        )
    if _is_foreign(request.name.partition(":")[0]):
        raise _foreign_code_error(request, str(request.config.model))


def _check_origin(factory: Callable[..., Any], request: BuildRequest) -> None:
    """Refuses functions of other packages that the module of the user imported, under any name."""
    if isinstance(factory, (type, types.FunctionType, types.BuiltinFunctionType)) and _is_foreign(
        module := factory.__module__ or "builtins"
    ):
        raise _foreign_code_error(request, f"{request.config.model}, which is {module}.{factory.__qualname__}")


def _is_foreign(module: str) -> bool:
    return module.partition(".")[0] in _FOREIGN_PACKAGES


def _foreign_code_error(request: BuildRequest, got: str) -> ModelError:
    return ModelError(
        "a python: factory must be your code, not that of the standard library or a framework",
        code="model.foreign-factory",
        where=f"{request.where}.model",
        got=got,
        expected="timm/NAME or torchvision/NAME for their models, or a factory of your package",
    )


def _heads(network: nn.Module, request: BuildRequest) -> tuple[str, ...]:
    if callable(getattr(network, "forward_embedding", None)):
        return ()
    if request.is_map:
        return _map_head(network, request)
    if request.has_several_heads:
        return _named_heads(network, request)
    name = last_layer(network, nn.Linear)
    layer = network.get_submodule(name) if name is not None else None
    if name is None or not isinstance(layer, nn.Linear) or layer.out_features != request.num_classes:
        raise ModelError(
            "the embedding is the input of the last nn.Linear, and this network does not end in one",
            code="model.no-linear-head",
            where=f"{request.where}.model",
            got=f"{name}: {layer}" if name is not None else "no nn.Linear at all",
            expected=f"a last nn.Linear for {request.described_classes}",
            next_step="register the head last, or define forward_embedding(x) -> (logits, embedding); for a network "
            "that returns an embedding, set data.task=embedding",
        )
    return (name,)


def _map_head(network: nn.Module, request: BuildRequest) -> tuple[str, ...]:
    """The last convolution of K channels outside of auxiliary heads."""
    names = [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.out_channels == request.num_classes and "aux" not in name
    ]
    if names:
        return (names[-1],)
    raise ModelError(
        "the embedding is the mean of what the last convolution takes, and this network does not end in one",
        code="model.no-map-head",
        where=f"{request.where}.model",
        got=f"no nn.Conv2d of {request.num_classes} channels in {request.config.model}",
        expected=f"a last nn.Conv2d for {request.described_classes}",
        next_step="register the head last, or define forward_embedding(x) -> (logits, embedding)",
    )


def _named_heads(network: nn.Module, request: BuildRequest) -> tuple[str, ...]:
    """The modules ``heads.NAME``, whose input is the embedding."""
    names = tuple(f"heads.{head}" for head in request.classes_by_head)
    missing = set(names) - dict(network.named_modules()).keys()
    if missing:
        raise ModelError(
            "the embedding is the input of the heads, and this network does not have them under their names",
            code="model.no-named-heads",
            where=f"{request.where}.model",
            got=f"no {', '.join(sorted(missing))} in {request.config.model}",
            expected=f"a network with the modules {', '.join(names)}, whose forward returns a dict by head",
            next_step="name them so, use stillroom.multi_head, or define forward_embedding(x) -> (dict, embedding)",
        )
    return names
