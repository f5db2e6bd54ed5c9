"""What every source of networks is asked and answers, and the errors they share."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from pipeline.core.errors import ConfigError, ModelError, StillroomError, cause
from schemas.config import ModelConfig, Triple


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """What a file of weights holds.

    Attributes:
        state: tensors on the CPU by the names that the file has.
        notes: what a user should know of the choice; empty where there was none.
        transform_input: of torchvision's GoogLeNet and Inception, in files that Stillroom wrote; None in others.
    """

    state: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()
    transform_input: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """A network to build.

    Attributes:
        name: what follows ``timm/``, ``torchvision/`` or ``python:``.
        num_classes: K, the width of the head.
        allow_new_head: pretrained weights with another head may be taken without it (the head is drawn anew).
        where: YAML section, such as ``teacher``.
        read: gives the weights that the caller loads into the network; None where there are none. Networks whose
            constructor depends on its weights look there.
        builds_only: the network is built as for its weights, which are not loaded, such as on the meta device.
        likely_size: pixels that the weights were probably made for, where they cannot be looked at; None: not known.
    """

    config: ModelConfig
    name: str
    num_classes: int
    allow_new_head: bool
    where: str
    read: Callable[[], WeightsFile] | None = None
    builds_only: bool = False
    likely_size: int | None = None

    @property
    def pretrained(self) -> bool:
        """Whether the source itself loads the library's weights."""
        return self.config.weights == "pretrained" and self.read is None and not self.builds_only

    def without_weights(self, likely_size: int | None) -> BuildRequest:
        """The same network, for what does not depend on the values of its weights."""
        return replace(self, read=None, builds_only=True, likely_size=likely_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredInput:
    """What the network itself says that it eats; None where it says nothing. ``size`` is in pixels."""

    size: int | None = None
    mean: Triple | None = None
    std: Triple | None = None
    interpolation: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltModel:
    """A bare network, the names of its heads (none: it has ``forward_embedding``), and what it eats.

    ``size_kwarg`` is the constructor's name for an input size, for advice in errors. ``embedding_dim`` is the library's
    D, to which the heads' inputs are compared; None where it gives none. ``notes`` are reported to the user.
    """

    network: nn.Module
    heads: tuple[str, ...]
    own: DeclaredInput
    size_kwarg: str | None = None
    embedding_dim: int | None = None
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def constructor_errors(request: BuildRequest) -> Generator[None]:
    """Whatever a constructor raises becomes a ModelError; its arguments are the user's."""
    try:
        yield
    except StillroomError:
        raise
    except Exception as error:
        raise ModelError(
            f"{request.config.model} cannot be built as asked",
            where=f"{request.where}.model",
            got=cause(error),
            next_step=f"check {request.where}.kwargs, which go to the constructor: {dict(request.config.kwargs)}",
        ) from error


def unknown_name(request: BuildRequest, names: Collection[str]) -> ModelError:
    """The error for a name that its library does not have, with the nearest that it has."""
    near = difflib.get_close_matches(request.name, names, n=3, cutoff=0.5)
    return ModelError(
        "there is no model of this name",
        where=f"{request.where}.model",
        got=request.config.model,
        expected=f"one of {', '.join(near)}, …" if near else f"one of {len(names)} names, none of them near",
        next_step="correct the name",
    )


def refuse_reserved(request: BuildRequest, reserved: Collection[str]) -> None:
    """Refuses constructor arguments that have a key of their own, or would load weights past ``weights``."""
    found = sorted(set(request.config.kwargs) & set(reserved))
    if found:
        raise ConfigError(
            f"kwargs may not hold {', '.join(found)}",
            where=f"{request.where}.kwargs",
            expected="classes from data.num_classes, weights from the section's weights key",
            next_step=f"remove {', '.join(found)} from kwargs",
        )


def refuse_untrained_head(request: BuildRequest, width: int) -> None:
    """Stops a teacher before the download when the pretrained head is not K wide."""
    if width == request.num_classes or request.allow_new_head:
        return
    raise ModelError(
        "the pretrained head has another width, so the teacher would speak with an untrained head",
        code="model.untrained-head",
        where=f"{request.where}.weights",
        got=f"{width} classes in {request.config.model}" if width else f"no head in {request.config.model}",
        expected=f"{request.num_classes} classes (data.num_classes)",
        next_step="fine-tune the teacher on these classes and give its weights as a URL",
    )


def download_error(request: BuildRequest, error: BaseException) -> ModelError:
    """The error for pretrained weights that did not arrive."""
    return ModelError(
        f"the pretrained weights of {request.config.model} could not be downloaded",
        where=f"{request.where}.weights",
        got=cause(error),
        expected="a connection to the model library's host, or its files in the local cache",
        next_step=f"try again online, or give {request.where}.weights as the URL of a file",
    )


def last_layer(network: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> str | None:
    """Name of the last submodule of a kind, in the order of registration."""
    names = [name for name, module in network.named_modules() if isinstance(module, kind)]
    return names[-1] if names else None
