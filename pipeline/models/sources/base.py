"""The interface of all model sources, and their shared errors."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from pipeline.core.errors import ConfigError, ModelError, StillroomError, cause
from pipeline.tasks import MapWidth
from schemas.config import ModelConfig, Size, Triple

if TYPE_CHECKING:
    from pipeline.models.text_head import TextHead

HEAD_PREFIX = "logits."
"""Outputs of networks with several heads are named by this and the name of the head."""


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """The content of a weights file.

    Attributes:
        state: tensors on the CPU, by their names in the file.
        notes: choices made on behalf of the user.
        transform_input: of torchvision's GoogLeNet and Inception, if Stillroom wrote the file; None in other files.
    """

    state: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()
    transform_input: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """A network to build.

    Attributes:
        source: builds networks of this name.
        name: what follows ``timm/``, ``torchvision/`` or ``python:``.
        widths: of what the heads return, by the outputs' names: one output, or several named ``logits.HEAD``.
        allow_new_head: a pretrained head of another width is replaced by a random one.
        where: YAML section, such as ``teacher``.
        read: reads the weights that the caller loads into the network, for constructors that depend on them; None
            without a weights file.
        skips_weights: build the network for its weights but do not load them, for example on the meta device.
        likely_size: input size in pixels that the weights were probably trained for, if they cannot be read.
        head: the classifier of the network that the source builds: a layer of the task's width; ``none``, so that the
            network returns its pooled features [B,D]; or ``published``, the layer of the library's weights. Without
            ``widths`` one of the last two: what the network returns is its embedding.
        text_head: makes logits of what a network without the task's head returns.
    """

    source: Callable[[BuildRequest], BuiltModel]
    config: ModelConfig
    name: str
    widths: Mapping[str, int]
    allow_new_head: bool
    where: str
    read: Callable[[], WeightsFile] | None = None
    skips_weights: bool = False
    likely_size: Size | None = None
    head: Literal["task", "none", "published"] = "task"
    text_head: TextHead | None = None

    @property
    def has_several_heads(self) -> bool:
        return len(self.widths) > 1

    @property
    def is_map(self) -> bool:
        """Whether the logits are a map [B,K,h,w]."""
        return any(isinstance(width, MapWidth) for width in self.widths.values())

    @property
    def num_classes(self) -> int:
        """K, the width of a single head, as the constructors of libraries call it; 0 for a network without one."""
        if self.head == "none":
            return 0
        (width,) = self.widths.values()
        return width

    @property
    def classes_by_head(self) -> dict[str, int]:
        """K of each head."""
        return {head_name(output): width for output, width in self.widths.items()}

    @property
    def described_classes(self) -> str:
        """The numbers of classes with the keys of the config that set them, for messages."""
        keys = (
            (width, f"data.heads.{head}.num_classes" if head != output else "data.num_classes")
            for (output, width), head in zip(self.widths.items(), self.classes_by_head, strict=True)
        )
        return ", ".join(f"{width} classes ({key})" for width, key in keys)

    @property
    def pretrained(self) -> bool:
        """Whether the source loads the weights of the library."""
        return self.config.weights == "pretrained" and self.read is None and not self.skips_weights

    def build(self) -> BuiltModel:
        return self.source(self)

    def without_weights(self, likely_size: Size | None) -> BuildRequest:
        """The same network without the values of its weights."""
        return replace(self, read=None, skips_weights=True, likely_size=likely_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredInput:
    """The input that a network declares; None where it declares nothing. ``size``: height and width in pixels."""

    size: Size | None = None
    mean: Triple | None = None
    std: Triple | None = None
    interpolation: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltModel:
    """A network as its source built it.

    Attributes:
        heads: names of the classifiers; empty if the network has ``forward_embedding``. Without the task's head, names
            of the layers that were removed: tensors that a weights file has for them are not loaded.
        declared: the input that the network declares.
        size_kwarg: argument of the constructor for the input size, for messages.
        embedding_dim: D according to the library, to be compared with the heads; None if it declares none.
        notes: choices made on behalf of the user.
        has_new_heads: the library's pretrained weights lack the heads, which have random values.
    """

    network: nn.Module
    heads: tuple[str, ...]
    declared: DeclaredInput
    size_kwarg: str | None = None
    embedding_dim: int | None = None
    notes: tuple[str, ...] = ()
    has_new_heads: bool = False


def head_name(output: str) -> str:
    """The name of the head that returns an output: ``pair`` for ``logits.pair``, and the output's name for others."""
    return output.removeprefix(HEAD_PREFIX)


@contextlib.contextmanager
def constructor_errors(request: BuildRequest) -> Generator[None]:
    """Turns every error of a constructor into a ModelError, since the user chose its arguments."""
    try:
        yield
    except StillroomError:
        raise
    except Exception as error:
        raise ModelError(
            f"{request.config.model} cannot be built with these arguments",
            code="model.constructor-failed",
            where=f"{request.where}.model",
            got=cause(error),
            next_step=f"check {request.where}.kwargs, which go to the constructor: {dict(request.config.kwargs)}"
            + (
                "; num_classes maps heads to integers, which stillroom.multi_head handles for a single classifier"
                if request.has_several_heads and request.head == "task"
                else ""
            ),
        ) from error


def unknown_name(request: BuildRequest, names: Collection[str]) -> ModelError:
    """The error for a name that its library does not have, with the nearest names."""
    near = difflib.get_close_matches(request.name, names, n=3, cutoff=0.5)
    return ModelError(
        "the library has no model of this name",
        code="model.unknown-name",
        where=f"{request.where}.model",
        got=request.config.model,
        expected=f"one of {', '.join(near)}, …" if near else f"one of {len(names)} names; none is similar",
        next_step="correct the name",
    )


def refuse_reserved(request: BuildRequest, reserved: Collection[str]) -> None:
    """Refuses constructor arguments that other keys set, or that would load weights past ``weights``."""
    refused = sorted(set(request.config.kwargs) & set(reserved))
    if refused:
        raise ConfigError(
            f"kwargs may not contain {', '.join(refused)}",
            code="config.reserved-kwargs",
            where=f"{request.where}.kwargs",
            expected="classes from data.num_classes or data.heads, weights from the section's weights key",
            next_step=f"remove {', '.join(refused)} from kwargs",
        )


def refuse_untrained_head(request: BuildRequest, width: int) -> None:
    """Refuses, before the download, a teacher whose pretrained head is not K wide."""
    if request.head != "task" or request.allow_new_head or width == request.num_classes:
        return
    raise untrained_head(request, width)


def untrained_head(request: BuildRequest, width: int) -> ModelError:
    """The error for a teacher whose pretrained weights, with a head of this width, have none of the requested heads."""
    return ModelError(
        "the pretrained head has another width, so the teacher's logits would come from an untrained one",
        code="model.untrained-head",
        where=f"{request.where}.weights",
        got=f"{width} classes in {request.config.model}" if width else f"no head in {request.config.model}",
        expected=request.described_classes,
        next_step="fine-tune the teacher on these classes and give its weights as a URL"
        + ("" if width else ", or set data.task=embedding: such a network is a teacher of its embedding"),
    )


def download_error(request: BuildRequest, error: BaseException) -> ModelError:
    """The error for pretrained weights that could not be downloaded."""
    return ModelError(
        f"the pretrained weights of {request.config.model} could not be downloaded",
        code="weights.download-failed",
        where=f"{request.where}.weights",
        got=cause(error),
        expected="a connection to the model library's host, or its files in the local cache",
        next_step=f"try again online, or give {request.where}.weights as the URL of a file",
    )


def last_layer(network: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> str | None:
    """The name of the last submodule of a kind, in the order of registration."""
    names = [name for name, module in network.named_modules() if isinstance(module, kind)]
    return names[-1] if names else None
