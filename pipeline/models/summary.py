"""Checks of a network without its weights in memory: parameters, embedding and input, and whether weights fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pipeline.core.errors import ModelError
from pipeline.models.load import InputSpec, build, load_weights, require_weights, resolve
from pipeline.models.probe import probe_outputs
from pipeline.models.sources.base import BuildRequest, BuiltModel
from pipeline.models.text_head import with_outputs
from pipeline.tasks import EMBEDDING
from schemas.config import ModelConfig, Size


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """``embedding_dim``: D."""

    num_parameters: int
    embedding_dim: int
    input: InputSpec


def summarize_model(config: ModelConfig, *, widths: Mapping[str, int], size: Size | None, where: str) -> ModelSummary:
    """Builds the network on torch's meta device and runs one forward there. Downloads nothing.

    Args:
        widths: as in ``load_model``.
        size: input height and width in pixels; None: the size that the model declares.
        where: YAML section of ``config``, for messages.

    Raises:
        ConfigError: a key is missing or contradicts another.
        ModelError: the model is unknown, cannot be built, or does not run at this size.
    """
    request = resolve(config, widths, True, where).without_weights(likely_size=size)
    built, spec = build(request, size, _on_meta)
    outputs = probe_outputs(with_outputs(built, request), request, size=spec.size)
    num_parameters = sum(parameter.numel() for parameter in built.network.parameters())
    return ModelSummary(num_parameters, outputs[EMBEDDING].shape[1], spec)


def _on_meta(request: BuildRequest) -> BuiltModel:
    try:
        with torch.device("meta"):
            return request.build()
    except ModelError as error:
        if not isinstance(error.__cause__, NotImplementedError):
            raise
    # The constructors of torchvision's RegNets compute with tensors, which have no values on the meta device.
    with torch.random.fork_rng(devices=[]):
        built = request.build()
    built.network.to("meta")
    return built


def check_weights(config: ModelConfig, *, widths: Mapping[str, int], size: Size | None, where: str) -> None:
    """Checks on the meta device that the weights of a teacher fit its network, as ``load_model`` does.

    Reads the whole weights file and computes no forward pass. Does not download the weights of a library.

    Args:
        widths: as in ``load_model``.
        size: input height and width in pixels; None: the size that the model declares.
        where: YAML section of ``config``, for messages.

    Raises:
        ConfigError, ModelError: as in ``summarize_model``; or ``weights`` is not set, or they do not fit.
        StorageInputError: the weights' URL is refused, missing or not readable.
    """
    require_weights(config, where=where)
    request = resolve(config, widths, False, where)
    if request.read is None:
        summarize_model(config, widths=widths, size=size, where=where)
        return
    request.read()  # outside of the meta device, which would hold the tensors of the file
    built, spec = build(request, size, _on_meta)
    probe_outputs(with_outputs(built, request), request, size=spec.size)
    load_weights(built, request)
