"""A trial forward pass checks the outputs of a network and determines the width D of its embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.core.errors import ModelError, StillroomError, cause
from pipeline.models.embedding import FINAL, EmbeddingModel, forward_with_embedding, register_head_hooks
from pipeline.models.sources.base import BuildRequest, BuiltModel, head_name
from pipeline.tasks import AUX, EMBEDDING
from schemas.config import Size, height_width

_T = TypeVar("_T")


def wrap(built: BuiltModel, request: BuildRequest, *, size: Size) -> EmbeddingModel:
    """The network as an ``EmbeddingModel`` in eval mode, checked by a forward of two images of ``size`` pixels.

    Raises:
        ModelError: the forward fails at this size, or its outputs are not finite, or not of the requested widths and a
            [2,D] embedding; or a student's heads do not return the same outputs in training mode.
    """
    outputs = probe_outputs(built, request, size=size)
    _check_finite(outputs, request)
    has_aux = request.where == "student" and _check_training(built, request, size=size)
    widths = {name: output.shape[1] for name, output in outputs.items()}
    return EmbeddingModel(built.network, built.heads, widths=widths, has_aux=has_aux).eval()


def probe_outputs(built: BuiltModel, request: BuildRequest, *, size: Size) -> dict[str, Tensor]:
    """Outputs of two images by name, in eval mode, on the device of the network (``meta`` has no values).

    Raises:
        ModelError: the forward fails at this size, or its outputs are not of the requested widths and a [2,D]
            embedding.
    """
    register_head_hooks(built.network, built.heads)
    output, embedding_BD = _forward(
        built, request, size, lambda images_BCHW: forward_with_embedding(built.network, built.heads, images_BCHW)
    )
    outputs = {**_by_name(output, request), EMBEDDING: embedding_BD}
    # The auxiliary head is for training.
    outputs.pop(AUX, None)
    _check_shapes(outputs, request)
    _check_width(built, embedding_BD.shape[1], request)
    return outputs


def backbone_output(built: BuiltModel, request: BuildRequest, *, size: Size) -> Tensor:
    """What a network without a classifier returns for two images: the embedding [2,D].

    Raises:
        ModelError: the forward fails at this size, or does not return an embedding.
    """
    embedding_BD = _forward(built, request, size, built.network)
    if isinstance(embedding_BD, Tensor) and embedding_BD.ndim == 2:
        return embedding_BD
    raise ModelError(
        f"{request.config.model} without its classifier does not return an embedding",
        code="model.output-shape",
        where=f"{request.where}.model",
        got=f"for 2 images: {_shape(embedding_BD)}",
        expected="(2, D)",
        next_step=f"check {request.where}.kwargs, such as global_pool, or choose another name",
    )


def _forward(built: BuiltModel, request: BuildRequest, size: Size, forward: Callable[[Tensor], _T]) -> _T:
    """One forward of two images in eval mode."""
    built.network.eval()
    try:
        with torch.no_grad():
            return forward(_images(built, size))
    except StillroomError:
        raise
    except Exception as error:
        raise ModelError(
            f"{request.config.model} does not run on images of {'×'.join(map(str, height_width(size)))} pixels",
            code="model.forward-failed",
            where=f"{request.where}.model",
            got=cause(error),
            expected=f"{', '.join(request.widths) or EMBEDDING} of RGB images [B,3,H,W] at this size",
            next_step=_size_hint(built, request, size),
        ) from error


def _by_name(output: object, request: BuildRequest) -> dict[str, Any]:
    """What a network returned, by the names of the outputs; heads that it lacks have no tensor."""
    if request.is_map and isinstance(output, Mapping):
        return {**dict.fromkeys(request.widths, output.get(FINAL)), **({AUX: output[AUX]} if AUX in output else {})}
    if not isinstance(output, Mapping):
        return {"one output": output} if request.has_several_heads else dict.fromkeys(request.widths, output)
    heads: Mapping[str, Any] = {str(head): tensor for head, tensor in output.items()}
    return {name: heads.get(head_name(name)) for name in request.widths}


def _images(built: BuiltModel, size: Size) -> Tensor:
    """A ramp [2,3,H,W] on the device of the network."""
    device = next(built.network.parameters(), torch.empty(0)).device
    height, width = height_width(size)
    return torch.linspace(-1, 1, 2 * 3 * height * width, device=device).reshape(2, 3, height, width)


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


def _check_training(built: BuiltModel, request: BuildRequest, *, size: Size) -> bool:
    """One forward in training mode, in which some networks return auxiliary outputs. Changes no state.

    Returns:
        Whether the network has an auxiliary map of logits, which is allowed next to a final one.
    """
    buffers = {name: buffer.clone() for name, buffer in built.network.named_buffers()}
    outputs: dict[str, Any] = {}
    failure: Exception | None = None
    built.network.train()
    try:
        # Dropout uses the generator, and BatchNorm changes its statistics.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output, embedding = forward_with_embedding(built.network, built.heads, _images(built, size))
            outputs = _by_name(output, request) or {EMBEDDING: embedding}
    except Exception as error:
        failure = error
    built.network.eval()
    with torch.no_grad():
        for name, buffer in built.network.named_buffers():
            buffer.copy_(buffers[name])
    positions = ",h,w" if request.is_map else ""
    expected = {name: f"a tensor [B,{width}{positions}]" for name, width in request.widths.items()} or {
        EMBEDDING: "a tensor [B,D]"
    }
    all_tensors = all(isinstance(output, Tensor) for output in outputs.values())
    if all_tensors and outputs.keys() - ({AUX} if request.is_map else set()) == expected.keys():
        return AUX in outputs
    raised = failure is not None
    problem = "fails" if raised else f"does not return {' and '.join(expected)} alone"
    raise ModelError(
        f"{request.config.model} {problem} in training mode",
        code="model.training-outputs",
        where=f"{request.where}.model",
        got=cause(failure) if raised else ", ".join(type(output).__name__ for output in outputs.values()),
        expected=f"{', '.join(expected.values())}, as in eval mode",
        next_step=f"turn auxiliary outputs off in {request.where}.kwargs, such as aux_logits: false"
        + (", or correct the network's forward" if raised else ""),
    ) from failure


def _check_shapes(outputs: Mapping[str, object], request: BuildRequest) -> None:
    shapes = {name: _shape(output) for name, output in outputs.items()}
    embedding_shape = shapes[EMBEDDING]
    expected: dict[str, tuple[object, ...]] = {name: (2, width) for name, width in request.widths.items()}
    if request.is_map:
        _check_maps(shapes, request)
        expected = {name: (*shape, *shapes[name][2:]) for name, shape in expected.items()}
    is_embedding = len(embedding_shape) == 2 and embedding_shape[0] == 2 and embedding_shape[1] != 0
    if shapes == {**expected, EMBEDDING: embedding_shape} and is_embedding:
        return
    returned = "dict by head" if request.has_several_heads else " and ".join(request.widths)
    raise ModelError(
        f"{request.config.model} does not return the expected outputs",
        code="model.output-shape",
        where=f"{request.where}.model",
        got=f"for 2 images: {', '.join(f'{name} {shape}' for name, shape in shapes.items())}",
        expected=", ".join(f"{name} {shape}" for name, shape in {**expected, EMBEDDING: "(2, D)"}.items()),
        next_step=f"check kwargs; your network can define forward_embedding(x) -> ({returned}, embedding)"
        if request.widths
        else "check kwargs, such as global_pool; a python: factory returns a network whose forward returns [B,D]",
    )


def _check_maps(shapes: Mapping[str, tuple[object, ...] | str], request: BuildRequest) -> None:
    """
    Raises:
        ModelError: logits have no positions.
    """
    for name, width in request.widths.items():
        if len(shapes[name]) == 4 and isinstance(shapes[name], tuple):
            continue
        raise ModelError(
            f"{request.config.model} has no logits for positions of an image",
            code="model.no-map",
            where=f"{request.where}.model",
            got=f"for 2 images: {name} {shapes[name]}",
            expected=f"(2, {width}, h, w), or a dict with such logits as {FINAL!r}",
            next_step="name a segmentation network of torchvision, a backbone of timm, or a python: factory of one",
        )


def _check_finite(outputs: Mapping[str, Tensor], request: BuildRequest) -> None:
    if all(output.isfinite().all() for output in outputs.values()):
        return
    raise ModelError(
        "the network returns NaN or infinity",
        code="model.not-finite",
        where=f"{request.where}.model",
        got=f"{request.config.model}, for two smooth images",
        expected=f"finite {' and '.join(outputs)}",
        next_step=f"check the weights ({request.where}.weights)",
    )


def _shape(value: object) -> tuple[object, ...] | str:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return "missing" if value is None else (type(value).__name__,)


def _size_hint(built: BuiltModel, request: BuildRequest, size: Size) -> str:
    key = "views.size" if request.where == "teacher" else f"{request.where}.size"
    native = "" if built.declared.size in (None, size) else f" to {built.declared.size}, the size of the model"
    rebuild = f"; or build for this size with {request.where}.kwargs: {{{built.size_kwarg}: {size}}} (ViT and similar)"
    return f"set {key}{native}{rebuild if built.size_kwarg else ''}"
