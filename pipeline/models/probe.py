"""One dry forward tells what a network really answers: K, D, and whether a linear layer joins the two."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.models.embedding import EmbeddingModel, ask, observe, reproduces
from pipeline.models.source import Built, Request, cause, last_layer


def wrap(built: Built, request: Request, *, size: int) -> EmbeddingModel:
    """The network as an ``EmbeddingModel`` in eval mode, proven by a forward of two images of ``size`` pixels.

    Raises:
        ModelError: the forward fails at this size, or does not give finite [2,K] logits and a finite [2,D] embedding.
    """
    logits_BK, embedding_BD = answers(built, request, size=size)
    _check_finite(logits_BK, embedding_BD, request)
    model = EmbeddingModel(
        built.network,
        built.heads,
        num_classes=request.num_classes,
        embedding_dim=embedding_BD.shape[1],
        linear_head=_linear_head(built, embedding_BD, logits_BK),
    )
    return model.eval()


def answers(built: Built, request: Request, *, size: int) -> tuple[Tensor, Tensor]:
    """logits_BK and embedding_BD of two images, in eval mode, on the device of the network (``meta`` has no numbers).

    Raises:
        ModelError: the forward fails at this size, or does not give [2,K] logits and a [2,D] embedding.
    """
    built.network.eval()
    observe(built.network, built.heads)
    device = next(built.network.parameters(), torch.empty(0)).device
    # A ramp, not zeros: a black image can leave every embedding at zero, and then any layer seems to be the head.
    images_BCHW = torch.linspace(-1, 1, 2 * 3 * size * size, device=device).reshape(2, 3, size, size)
    try:
        with torch.no_grad():
            logits_BK, embedding_BD = ask(built.network, built.heads, images_BCHW)
    except Exception as error:
        raise ModelError(
            f"{request.config.model} does not run on images of {size}×{size} pixels",
            where=f"{request.where}.model",
            got=cause(error),
            wanted="logits of RGB images [B,3,H,W] at this size",
            next_step=_size_advice(built, request, size),
        ) from error
    _check(logits_BK, embedding_BD, request)
    return logits_BK, embedding_BD


def _check(logits_BK: object, embedding_BD: object, request: Request) -> None:
    logits_shape, embedding_shape = _shape(logits_BK), _shape(embedding_BD)
    if logits_shape == (2, request.num_classes) and len(embedding_shape) == 2 and embedding_shape[0] == 2:
        return
    raise ModelError(
        f"{request.config.model} does not answer with logits and an embedding",
        where=f"{request.where}.model",
        got=f"for 2 images: logits {logits_shape}, embedding {embedding_shape}",
        wanted=f"logits (2, {request.num_classes}), embedding (2, D)",
        next_step="check kwargs; a network of your own may give forward_embedding(x) -> (logits, embedding)",
    )


def _check_finite(logits_BK: Tensor, embedding_BD: Tensor, request: Request) -> None:
    if logits_BK.isfinite().all() and embedding_BD.isfinite().all():
        return
    raise ModelError(
        "the network answers with NaN or infinity",
        where=f"{request.where}.model",
        got=f"from {request.config.model}, for two smooth images",
        wanted="finite logits and embedding",
        next_step=f"check the weights ({request.where}.weights)",
    )


def _shape(value: object) -> tuple[object, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else (type(value).__name__,)


def _linear_head(built: Built, embedding_BD: Tensor, logits_BK: Tensor) -> str | None:
    """The layer that turns embedding into logits: the one head, or the last nn.Linear beside forward_embedding."""
    if len(built.heads) > 1:
        return None
    name = built.heads[0] if built.heads else last_layer(built.network, nn.Linear)
    layer = None if name is None else built.network.get_submodule(name)
    return name if isinstance(layer, nn.Linear) and reproduces(layer, embedding_BD, logits_BK) else None


def _size_advice(built: Built, request: Request, size: int) -> str:
    key = "views.size" if request.where == "teacher" else f"{request.where}.size"
    known = "" if built.own.size in (None, size) else f" to {built.own.size}, the model's own"
    rebuilt = f"; or build for this size with {request.where}.kwargs: {{{built.size_kwarg}: {size}}} (ViT and kin)"
    return f"set {key}{known}{rebuilt if built.size_kwarg else ''}"
