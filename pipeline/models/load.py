"""Builds the network of a YAML section, which returns outputs by name, and its input spec."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, cast, get_args

import torch

from pipeline import storage
from pipeline.core.errors import ConfigError, ModelError, StorageError, StorageInputError
from pipeline.core.hashing import canonical_json
from pipeline.core.redaction import redact
from pipeline.models.embedding import EmbeddingModel
from pipeline.models.head_weights import fit_heads
from pipeline.models.heads import backbone_request, selected_widths, with_heads
from pipeline.models.probe import wrap
from pipeline.models.sources import python, timm, torchvision
from pipeline.models.sources.base import BuildRequest, BuiltModel, DeclaredInput, WeightsFile
from pipeline.models.text_head import (
    check_text_head_keys,
    read_text_head,
    text_head_notes,
    with_outputs,
    without_heads,
)
from pipeline.models.weights import load_state, read_state, student_of_run, weights_read_errors
from schemas.config import Interpolation, ModelConfig, Size, TeacherModelConfig, Triple

_NAME_FORMS = "timm/NAME, torchvision/NAME or python:package.module:factory"
_SOURCES: dict[str, Callable[[BuildRequest], BuiltModel]] = {
    "timm/": timm.build,
    "torchvision/": torchvision.build,
    "python:": python.build,
}


@dataclass(frozen=True, slots=True)
class InputSpec:
    """The input that a network expects.

    Attributes:
        size: height and width in pixels.
        mean, std: per channel, of [0,1] RGB.
        interpolation: for resizing a box of the original image to ``size``.
    """

    size: Size
    mean: Triple
    std: Triple
    interpolation: Interpolation


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A network on the CPU in eval mode, its input, and its part of the fingerprint.

    Attributes:
        architecture: model name, kwargs and num_classes as JSON, which weights do not contain. With heads, num_classes
            maps their names to their K.
        notes: choices made on behalf of the user, to be logged once.
        random_outputs: names of the outputs whose heads have random values.
    """

    module: EmbeddingModel
    input: InputSpec
    architecture: dict[str, object]
    notes: tuple[str, ...] = ()
    random_outputs: frozenset[str] = frozenset()


def load_model(
    config: ModelConfig,
    *,
    widths: Mapping[str, int],
    size: Size | None,
    seed: int = 0,
    allow_new_head: bool = False,
    where: str = "teacher",
    expected_weights: WeightsFile | None = None,
) -> LoadedModel:
    """Builds the network, loads its weights and checks both with one forward.

    Args:
        widths: of what the heads return, by the outputs' names: one output, or several named ``logits.HEAD``. A teacher
            gets those of its ``heads``.
        size: input height and width in pixels; None: the size that the model declares.
        seed: random weights are a pure function of it and the config. Global generators do not change.
        allow_new_head: pretrained weights with another number of classes get a new, random head. For students only:
            logits of a teacher must not come from an untrained head.
        where: YAML section of ``config``, for messages.
        expected_weights: weights that the caller loads afterwards, such as those of a checkpoint, for constructors that
            depend on them.

    Raises:
        ConfigError: a key is missing, such as ``weights``, or contradicts another.
        ModelError: the model is unknown, cannot be built, does not run at this size, or its weights do not fit.
        StorageInputError: the URL of the weights is refused, missing or not readable.
    """
    request = resolve(config, widths, allow_new_head, where)
    require_weights(config, where=where)
    architecture = _architecture(request)
    if expected_weights is not None:
        request = replace(request, read=lambda: expected_weights)
    with _seeded(seed):
        built, spec = build(request, size)
    loaded = load_weights(built, request) if expected_weights is None else LoadedWeights()
    module = wrap(with_outputs(built, request), request, size=spec.size)
    are_random = built.has_new_heads or config.weights == "random"
    random_outputs = {
        output for output in module.head_outputs if are_random or loaded.lacks(module.head_modules(output))
    }
    notes = (*loaded.notes, *built.notes, *text_head_notes(request))
    return LoadedModel(module, spec, architecture, notes, frozenset(random_outputs))


def load_untrained(
    config: ModelConfig, *, widths: Mapping[str, int], size: Size | None, likely_size: Size | None = None
) -> LoadedModel:
    """Builds a teacher's network without loading its weights, for properties that do not depend on their values.

    Args:
        likely_size: input size in pixels that the weights were probably trained for; default: ``size``.

    Raises:
        ConfigError, ModelError: as in ``load_model``.
    """
    request = resolve(config, widths, True, "teacher").without_weights(likely_size=likely_size or size)
    with _seeded(0):
        built, spec = build(request, size)
    module = wrap(with_outputs(built, request), request, size=spec.size)
    return LoadedModel(module, spec, _architecture(request), built.notes)


def build(
    request: BuildRequest, size: Size | None, backbone: Callable[[BuildRequest], BuiltModel] = BuildRequest.build
) -> tuple[BuiltModel, InputSpec]:
    """The network with all of its heads, and its input. Factories of the user build several heads themselves.

    Args:
        size: as in ``load_model``.
        backbone: builds what the source of the request does.
    """
    adds_heads = request.has_several_heads and request.source is not python.build
    built = backbone(backbone_request(request) if adds_heads else request)
    spec = input_spec(request.config, built.declared, size, request.where)
    return with_heads(built, request, size=spec.size) if adds_heads else built, spec


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """What a weights file brought.

    Attributes:
        notes: choices made on behalf of the user, to be logged once.
        missing: names of the tensors that it lacks.
    """

    notes: tuple[str, ...] = ()
    missing: Sequence[str] = ()

    def lacks(self, modules: Iterable[str]) -> bool:
        """Whether it lacks a tensor of these modules."""
        return any(name.startswith(tuple(f"{module}." for module in modules)) for name in self.missing)


def load_weights(built: BuiltModel, request: BuildRequest) -> LoadedWeights:
    """Copies the tensors of the weights URL, if there is one, into the network.

    On the meta device this compares names and shapes.

    Raises:
        ModelError: the weights do not fit, or their digest is not ``sha256``.
        StorageInputError: the URL is refused, missing or not readable.
    """
    if request.read is None:
        return LoadedWeights()
    file, where = request.read(), f"{request.where}.weights"
    device = next(iter(built.network.state_dict().values()), torch.empty(0)).device
    if device.type == "meta":
        # In place, since a state dict may have module versions as an attribute.
        state = cast("dict[str, torch.Tensor]", file.state)
        for name, tensor in state.items():
            state[name] = tensor.to(device)
    if request.head == "task":
        state, notes, missing = fit_heads(file.state, built, request)
    else:
        (state, removed), missing = without_heads(built, file.state), []
        notes = (f"{where}: tensors of the classifier are left out ({', '.join(removed)})",) if removed else ()
    load_state(built.network, state, source=redact(str(request.config.weights)), where=where)
    return LoadedWeights((*file.notes, *notes), missing)


def _reader(config: ModelConfig, where: str) -> Callable[[], WeightsFile] | None:
    """A function that reads the weights file once."""
    url = config.weights_url
    if url is None:
        return None

    @cache
    def read() -> WeightsFile:
        with weights_read_errors(url, where=where):
            file_url = url if isinstance(config, TeacherModelConfig) else student_of_run(url)
            file = read_state(file_url, sha256=config.sha256, where=where)
        note = f"{where}: those of the run's {storage.last_name(redact(file_url))}"
        return file if file_url == url else replace(file, notes=(note, *file.notes))

    return read


def unreadable_weights(config: ModelConfig) -> str | None:
    """The reason why this machine cannot read the weights file, tested by a request for its size; None if it can, or if
    there is no file.

    Raises:
        StorageInputError: the URL is refused.
    """
    if config.weights_url is None:
        return None
    storage.protocol(config.weights_url)
    try:
        storage.size(config.weights_url)
    except (StorageInputError, StorageError) as error:
        return error.what
    return None


def require_weights(config: ModelConfig, *, where: str) -> None:
    """
    Args:
        where: YAML section of ``config``, for messages.

    Raises:
        ConfigError: ``weights`` is not set. It has no default, since a cache of random outputs would be useless.
    """
    if config.weights is not None:
        return
    raise ConfigError(
        "no weights are given",
        code="config.teacher-weights-missing",
        where=f"{where}.weights",
        got=f"{config.model} without weights",
        expected="pretrained, the URL of a file, or random (an untrained network)",
        next_step=f"append {where}.weights=pretrained, or {where}.weights=URL",
    )


def random_weights_warnings(sections: Mapping[str, ModelConfig]) -> list[str]:
    """One line for each teacher whose weights are random.

    Args:
        sections: teachers by the names of their YAML sections.
    """
    return [
        f"{where}.weights is random: {_random_network(config)}; set {where}.weights=pretrained, or the URL of a file"
        for where, config in sections.items()
        if config.model is not None and config.weights == "random"
    ]


def _random_network(config: ModelConfig) -> str:
    if (config.model or "").startswith("python:"):
        return f"no weights are loaded into what {config.model} returns, so the teacher is untrained unless that is"
    return f"{config.model} is untrained, and its outputs carry no knowledge of any class"


def resolve(config: ModelConfig, widths: Mapping[str, int], allow_new_head: bool, where: str) -> BuildRequest:
    """The request for this network. Arguments as in ``load_model``."""
    if config.model is None:
        raise ConfigError(
            "no model is given", code="config.model-missing", where=f"{where}.model", expected=_NAME_FORMS
        )
    if config.sha256 is not None and config.weights_url is None:
        raise ConfigError(
            "sha256 checks a weights URL, and there is none",
            code="config.sha256-without-url",
            where=f"{where}.sha256",
            got=f"weights: {config.weights}",
            next_step="remove sha256, or give weights as a URL",
        )
    check_text_head_keys(config, widths, where=where)
    widths = selected_widths(widths, config)
    text_head = read_text_head(config, widths, where=where)
    for prefix, source in _SOURCES.items():
        name = config.model.removeprefix(prefix)
        if name and name != config.model:
            return BuildRequest(
                source=source,
                config=config,
                name=name,
                widths=widths,
                allow_new_head=allow_new_head,
                where=where,
                read=_reader(config, f"{where}.weights"),
                head=_head_to_build(config, widths),
                text_head=text_head,
            )
    raise ModelError(
        "this model name has an unknown form",
        code="model.unknown-source",
        where=f"{where}.model",
        got=config.model,
        expected=_NAME_FORMS,
    )


def _head_to_build(config: ModelConfig, widths: Mapping[str, int]) -> Literal["task", "none", "published"]:
    is_teacher = isinstance(config, TeacherModelConfig)
    if widths and (not is_teacher or config.text_head is None):
        return "task"
    return "published" if is_teacher and config.embedding == "output" else "none"


def _architecture(request: BuildRequest) -> dict[str, object]:
    by_head = request.classes_by_head
    described: dict[str, object] = {
        "model": request.config.model,
        "kwargs": request.config.kwargs,
        "num_classes": by_head if by_head.keys() != request.widths.keys() else sum(by_head.values()),
    }
    # Only if there is one, so that the fingerprints of all other teachers stay.
    if request.text_head is not None:
        described["text_head"] = request.text_head.sha256
    if request.head != "task":
        described["embedding"] = "output" if request.head == "published" else "penultimate"
    try:
        return json.loads(canonical_json(described))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "kwargs must be plain YAML: text, numbers, booleans, lists and maps with text keys",
            code="config.kwargs-not-plain",
            where=f"{request.where}.kwargs",
            got=str(error),
        ) from error


@contextlib.contextmanager
def _seeded(seed: int) -> Generator[None]:
    # Only the CPU generator: networks are built there, and torch.manual_seed would seed every GPU as well.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def input_spec(config: ModelConfig, declared: DeclaredInput, size: Size | None, where: str) -> InputSpec:
    """The values of the YAML section, else those that the network declares; mean, std and size have no default."""
    chosen: dict[str, Any] = {
        "mean": config.mean or declared.mean,
        "std": config.std or declared.std,
        "size": size or declared.size,
    }
    missing = [key for key, value in chosen.items() if value is None]
    if missing:
        examples = {key: f"{where}.{key}=[0.5,0.5,0.5]" for key in ("mean", "std")} | {"size": "views.size=224"}
        raise ConfigError(
            f"{config.model} does not declare its input; {', '.join(missing)} must be given",
            code="config.model-input-missing",
            where=where,
            got=f"no {', '.join(missing)}",
            expected=f"{where}.mean and {where}.std of [0,1] RGB, and a size in pixels (views.size or student.size)",
            next_step=f"append {' '.join(examples[key] for key in missing)}, or the values that it was trained with",
        )
    if min(chosen["std"]) <= 0:
        raise ConfigError(
            "std must be above 0", code="config.std-not-positive", where=f"{where}.std", got=list(chosen["std"])
        )
    return InputSpec(**chosen, interpolation=_interpolation(config, declared, where))


def _interpolation(config: ModelConfig, declared: DeclaredInput, where: str) -> Interpolation:
    supported: dict[str, Interpolation] = {name: name for name in get_args(Interpolation)}
    if config.interpolation is not None:
        return config.interpolation
    if declared.interpolation is None and (config.model or "").startswith("python:"):
        return "bilinear"  # the documented default for networks of the user
    if declared.interpolation not in supported:
        raise ModelError(
            f"{config.model} was trained with an interpolation that is not supported",
            code="model.unsupported-interpolation",
            where=f"{where}.interpolation",
            got=declared.interpolation,
            expected=" or ".join(supported),
            next_step=f"set {where}.interpolation and check the model's accuracy",
        )
    return supported[declared.interpolation]
