"""Zero-shot classification: logits from an image embedding and one text embedding for each class (CLIP, 2103.00020)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline import storage
from pipeline.core.errors import ConfigError, ModelError, cause
from pipeline.core.hashing import digest
from pipeline.core.redaction import redact
from pipeline.models.sources.base import BuildRequest, BuiltModel
from pipeline.models.state_dicts import rename_to_match
from pipeline.models.weights import check_digest, safetensors_metadata, weights_read_errors
from pipeline.tasks import MapWidth
from schemas.config import ModelConfig, TeacherModelConfig

_MAX_BYTES = 2**30
_NUM_QUOTED_NAMES = 5
# CLIP starts to train at 1/0.07 = 14.3 and ends near 100; the logarithm of 100 is 4.6.
_LOWEST_USUAL_SCALE = 6.0
_CONTENT = (
    "a safetensors file with floating weight [K,D] without NaN, infinity or zero rows, a positive logit_scale, and the "
    "metadata names: a JSON list of K different class names"
)


class TextHead(nn.Module):
    """``logit_scale · cos(embedding, weight)`` in fp32, also under autocast.

    Attributes:
        weight_KD: text embeddings of the classes, of norm 1.
        names: of the classes, in the order of the logits.
        sha256: of the file.
        where: YAML key and file, for messages.
    """

    weight_KD: Tensor
    logit_scale: Tensor

    def __init__(
        self, weight_KD: Tensor, logit_scale: Tensor, *, names: tuple[str, ...], sha256: str, where: str
    ) -> None:
        super().__init__()
        self.names, self.sha256, self.where = names, sha256, where
        # Not in the state dict, which has the tensors of the weights file.
        self.register_buffer("weight_KD", functional.normalize(weight_KD.double(), dim=1).float(), persistent=False)
        self.register_buffer("logit_scale", logit_scale.float().reshape(()), persistent=False)

    def forward(self, embedding_BD: Tensor) -> Tensor:
        """fp32 logits ``[B,K]``. An embedding of zeros has logits 0."""
        device = embedding_BD.device.type
        # The meta device of checks without weights has no autocast.
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            return self.logit_scale * functional.normalize(embedding_BD.float(), dim=1) @ self.weight_KD.T

    @property
    def width(self) -> int:
        """D."""
        return self.weight_KD.shape[1]


class ZeroShotNetwork(nn.Module):
    """A network that returns its embedding [B,D], with a text head on it."""

    def __init__(self, backbone: nn.Module, text_head: TextHead) -> None:
        super().__init__()
        self.backbone, self.text_head = backbone, text_head

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.forward_embedding(images_BCHW)[0]

    def forward_embedding(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """
        Returns:
            (logits [B,K], embedding [B,D]); the embedding is not normalised.

        Raises:
            ModelError: the embedding has another width than the text head.
        """
        embedding_BD = self.backbone(images_BCHW)
        head = self.text_head
        if not isinstance(embedding_BD, Tensor) or embedding_BD.ndim != 2 or embedding_BD.shape[1] != head.width:
            got = tuple(embedding_BD.shape) if isinstance(embedding_BD, Tensor) else type(embedding_BD).__name__
            raise ModelError(
                "the embedding of the network and the text head differ in width",
                code="text-head.width",
                where=head.where,
                got=f"embeddings {got} of {len(images_BCHW)} images, a text head {tuple(head.weight_KD.shape)}",
                expected=f"embeddings [B,{head.width}]",
                next_step="use the text tower of the same model; for a CLIP tower of timm, whose projection is the "
                "classifier, embedding: output takes the projected features, and embedding: penultimate those before",
            )
        return head(embedding_BD), embedding_BD


def check_text_head_keys(config: ModelConfig, widths: Mapping[str, int], *, where: str) -> None:
    """
    Args:
        widths: of what the heads return, by the outputs' names; empty for a task without heads.
        where: YAML section of ``config``, for messages.

    Raises:
        ConfigError: a key is set that has no effect without another, or for this source of networks.
    """
    if not isinstance(config, TeacherModelConfig):
        return
    if config.text_head is not None and not widths:
        raise ConfigError(
            "a text head makes logits, which networks of task embedding do not have",
            code="config.text-head-without-classes",
            where=f"{where}.text_head",
            got=redact(config.text_head),
            next_step=f"remove {where}.text_head, or set data.task=classification and data.num_classes",
        )
    if config.text_head is None and config.text_head_sha256 is not None:
        raise ConfigError(
            "text_head_sha256 checks a text head, and there is none",
            code="config.sha256-without-url",
            where=f"{where}.text_head_sha256",
            next_step="remove text_head_sha256, or give text_head as a URL",
        )
    if config.embedding == "penultimate":
        return
    if config.text_head is None and widths:
        raise ConfigError(
            "embedding: output replaces the classifier, so the logits need a text head",
            code="config.embedding-output",
            where=f"{where}.embedding",
            got=config.embedding,
            expected=f"{where}.text_head, the URL of class embeddings, or data.task: embedding",
            next_step=f"remove {where}.embedding, or give {where}.text_head",
        )
    if not (config.model or "").startswith("timm/"):
        raise ConfigError(
            "embedding: output takes the output of a classifier of timm, such as the projection of a CLIP tower",
            code="config.embedding-output",
            where=f"{where}.embedding",
            got=f"{config.embedding} for {config.model}",
            expected="timm/NAME; a python: factory itself returns the embedding that it is to have",
            next_step=f"remove {where}.embedding",
        )


def read_text_head(config: ModelConfig, widths: Mapping[str, int], *, where: str) -> TextHead | None:
    """The text head of a config; None if it has none.

    Args:
        widths: K of each of the network's heads, by the names of their outputs.
        where: YAML section of ``config``, for messages.

    Raises:
        ConfigError: the network has several heads.
        ModelError: the file has another digest, content or number of classes.
        StorageInputError: the URL is refused, missing, not readable or larger than 1 GiB.
    """
    url = config.text_head if isinstance(config, TeacherModelConfig) else None
    if url is None:
        return None
    key = f"{where}.text_head"
    if any(isinstance(width, MapWidth) for width in widths.values()):
        raise ConfigError(
            "a text head makes logits of an embedding, and this task has them for each position",
            code="config.text-head-of-maps",
            where=key,
            got=redact(url),
            next_step=f"remove {key}",
        )
    if len(widths) > 1:
        raise ConfigError(
            "a text head is a single head, and this teacher has several",
            code="config.text-head-of-several-heads",
            where=key,
            got=f"heads for {', '.join(widths)}",
            expected="one head",
            next_step=f"append {where}.heads=[NAME], with one cache for each other head",
        )
    with weights_read_errors(url, where=key):
        data = storage.read(url, max_bytes=_MAX_BYTES)
    check_digest(data, cast("TeacherModelConfig", config).text_head_sha256, url, key)
    place = f"{key}: {redact(url)}"
    weight_KD, logit_scale, names = _parse(data, place)
    ((output, num_classes),) = widths.items()
    if len(names) != num_classes:
        raise ModelError(
            "the text head has another number of classes than the data",
            code="text-head.num-classes",
            where=place,
            got=f"{len(names)} classes: {_quoted(names)}",
            expected=f"{num_classes} classes ({output}; data.num_classes)",
            next_step="write a file with one row for each class of the data, in the order of the labels",
        )
    return TextHead(weight_KD, logit_scale, names=names, sha256=digest(data), where=place)


def _parse(data: bytes, place: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError) as error:
        raise _invalid(place, cause(error)) from error
    shapes = ", ".join(f"{name} {str(tensor.dtype)[6:]}{list(tensor.shape)}" for name, tensor in tensors.items())
    weight_KD, scale = tensors.get("weight"), tensors.get("logit_scale")
    if weight_KD is None or scale is None or len(tensors) != 2 or weight_KD.ndim != 2 or scale.numel() != 1:
        raise _invalid(place, shapes or "no tensors")
    if not weight_KD.is_floating_point() or not weight_KD.isfinite().all() or not weight_KD.any(dim=1).all():
        raise _invalid(place, f"{shapes}; NaN, infinity or a row of zeros in weight")
    if not scale.isfinite().all() or not scale.item() > 0:
        raise _invalid(place, f"logit_scale {scale.item()}")
    names = _names(safetensors_metadata(data))
    if names is None or len(names) != len(weight_KD):
        stated = "no list of different names" if names is None else f"{len(names)} names"
        raise _invalid(place, f"{stated} in the metadata; {shapes}")
    return weight_KD, scale, names


def _names(metadata: object) -> tuple[str, ...] | None:
    text = metadata.get("names") if isinstance(metadata, Mapping) else None
    try:
        names: Any = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        return None
    return tuple(names) if len(set(names)) == len(names) else None


def _invalid(place: str, got: str) -> ModelError:
    return ModelError(
        "this file is not a text head",
        code="text-head.invalid",
        where=place,
        got=got,
        expected=_CONTENT,
        next_step="write the file again, as the page on teachers without a classifier shows",
    )


def _quoted(names: tuple[str, ...]) -> str:
    return ", ".join(names[:_NUM_QUOTED_NAMES]) + (", …" if len(names) > _NUM_QUOTED_NAMES else "")


def with_outputs(built: BuiltModel, request: BuildRequest) -> BuiltModel:
    """The network as it produces outputs: with the text head of its section, on its device, or without any head."""
    if not request.widths:
        return replace(built, heads=(), embedding_dim=None)
    if request.text_head is None:
        return built
    device = next(built.network.parameters(), torch.empty(0)).device
    network = ZeroShotNetwork(built.network, request.text_head.to(device))
    return replace(built, network=network, heads=(), embedding_dim=None)


def without_heads(built: BuiltModel, state: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], list[str]]:
    """The tensors of a weights file without those of the classifiers that the network was built without, and the names
    of the latter."""
    expected = built.network.state_dict().keys()
    heads = tuple(f"{head}." for head in built.heads)
    remaining = rename_to_match(state, expected)
    removed = sorted(name for name in remaining if name.startswith(heads) and name not in expected)
    for name in removed:
        del remaining[name]
    return remaining, removed


def text_head_notes(request: BuildRequest) -> tuple[str, ...]:
    """The order of the classes, which decides what the labels mean, and a scale that looks like CLIP's parameter."""
    head = request.text_head
    if head is None:
        return ()
    key, scale = f"{request.where}.text_head", head.logit_scale.item()
    notes = [f"{key}: the labels 0, 1, … are {_quoted(head.names)}"]
    if scale < _LOWEST_USUAL_SCALE:
        notes.append(
            f"{key}: logit_scale is {scale:.4g}; CLIP-like models store its logarithm, and this file needs "
            "model.logit_scale.exp()"
        )
    return tuple(notes)
