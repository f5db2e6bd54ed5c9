"""A trial forward pass checks the outputs of a network and determines the width D of its embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.core.errors import ModelError, cause
from pipeline.models.embedding import EmbeddingModel, forward_with_embedding, register_head_hooks
from pipeline.models.sources.base import BuildRequest, BuiltModel
from pipeline.tasks import EMBEDDING
from pipeline.tasks.classification import LOGITS


def wrap(built: BuiltModel, request: BuildRequest, *, size: int) -> EmbeddingModel:
    """The network as an ``EmbeddingModel`` in eval mode, checked by a forward of two images of ``size`` pixels.

    Raises:
        ModelError: the forward fails at this size, or its outputs are not finite [2,K] logits and a finite [2,D]
            embedding; or the network of a student does not return logits alone in training mode.
    """
    logits_BK, embedding_BD = probe_outputs(built, request, size=size)
    _check_finite(logits_BK, embedding_BD, request)
    if request.where == "student":
        _check_training(built, request, size=size)
    widths = {LOGITS: request.num_classes, EMBEDDING: embedding_BD.shape[1]}
    return EmbeddingModel(built.network, built.heads, widths=widths).eval()


def probe_outputs(built: BuiltModel, request: BuildRequest, *, size: int) -> tuple[Tensor, Tensor]:
    """logits_BK and embedding_BD of two images, in eval mode, on the device of the network (``meta`` has no values).

    Raises:
        ModelError: the forward fails at this size, or its outputs are not [2,K] logits and a [2,D] embedding.
    """
    built.network.eval()
    register_head_hooks(built.network, built.heads)
    images_BCHW = _images(built, size)
    try:
        with torch.no_grad():
            logits_BK, embedding_BD = forward_with_embedding(built.network, built.heads, images_BCHW)
    except Exception as error:
        raise ModelError(
            f"{request.config.model} does not run on images of {size}×{size} pixels",
            code="model.forward-failed",
            where=f"{request.where}.model",
            got=cause(error),
            expected="logits of RGB images [B,3,H,W] at this size",
            next_step=_size_hint(built, request, size),
        ) from error
    _check_shapes(logits_BK, embedding_BD, request)
    _check_width(built, embedding_BD.shape[1], request)
    return logits_BK, embedding_BD


def _images(built: BuiltModel, size: int) -> Tensor:
    """A ramp [2,3,size,size] on the device of the network."""
    device = next(built.network.parameters(), torch.empty(0)).device
    return torch.linspace(-1, 1, 2 * 3 * size * size, device=device).reshape(2, 3, size, size)


def _check_width(built: BuiltModel, width: int, request: BuildRequest) -> None:
    if built.embedding_dim in (None, width):
        return
    raise ModelError(
        f"the input of the head of {request.config.model} is not the embedding of the library",
        code="model.embedding-width",
        where=f"{request.where}.model",
        got=f"D = {width} at {' and '.join(built.heads)}",
        expected=f"D = {built.embedding_dim}, the network's head_hidden_size",
        next_step=f"check {request.where}.kwargs, such as global_pool, or choose another name",
    )


def _check_training(built: BuiltModel, request: BuildRequest, *, size: int) -> None:
    """One forward in training mode, in which some networks return auxiliary outputs. Changes no state."""
    buffers = {name: buffer.clone() for name, buffer in built.network.named_buffers()}
    logits: object = None
    failure: Exception | None = None
    built.network.train()
    try:
        # Dropout uses the generator, and BatchNorm changes its statistics.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits, _ = forward_with_embedding(built.network, built.heads, _images(built, size))
    except Exception as error:
        failure = error
    built.network.eval()
    with torch.no_grad():
        for name, buffer in built.network.named_buffers():
            buffer.copy_(buffers[name])
    if isinstance(logits, Tensor):
        return
    raised = failure is not None
    raise ModelError(
        f"{request.config.model} {'fails' if raised else 'does not return logits alone'} in training mode",
        code="model.training-outputs",
        where=f"{request.where}.model",
        got=cause(failure) if raised else type(logits).__name__,
        expected=f"a tensor [B,{request.num_classes}], as in eval mode",
        next_step=f"turn auxiliary outputs off in {request.where}.kwargs, such as aux_logits: false"
        + (", or correct the network's forward" if raised else ""),
    ) from failure


def _check_shapes(logits_BK: object, embedding_BD: object, request: BuildRequest) -> None:
    logits_shape, embedding_shape = _shape(logits_BK), _shape(embedding_BD)
    if logits_shape == (2, request.num_classes) and len(embedding_shape) == 2 and embedding_shape[0] == 2:
        return
    raise ModelError(
        f"{request.config.model} does not return logits and an embedding",
        code="model.output-shape",
        where=f"{request.where}.model",
        got=f"for 2 images: logits {logits_shape}, embedding {embedding_shape}",
        expected=f"logits (2, {request.num_classes}), embedding (2, D)",
        next_step="check kwargs; your network can define forward_embedding(x) -> (logits, embedding)",
    )


def _check_finite(logits_BK: Tensor, embedding_BD: Tensor, request: BuildRequest) -> None:
    if logits_BK.isfinite().all() and embedding_BD.isfinite().all():
        return
    raise ModelError(
        "the network returns NaN or infinity",
        code="model.not-finite",
        where=f"{request.where}.model",
        got=f"{request.config.model}, for two smooth images",
        expected="finite logits and embedding",
        next_step=f"check the weights ({request.where}.weights)",
    )


def _shape(value: object) -> tuple[object, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else (type(value).__name__,)


def _size_hint(built: BuiltModel, request: BuildRequest, size: int) -> str:
    key = "views.size" if request.where == "teacher" else f"{request.where}.size"
    native = "" if built.declared.size in (None, size) else f" to {built.declared.size}, the size of the model"
    rebuild = f"; or build for this size with {request.where}.kwargs: {{{built.size_kwarg}: {size}}} (ViT and similar)"
    return f"set {key}{native}{rebuild if built.size_kwarg else ''}"
