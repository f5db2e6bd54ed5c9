"""Weights whose heads are not those of the network: other heads are left out, and missing ones are new or refused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from pipeline.core.errors import ModelError
from pipeline.core.redaction import redact
from pipeline.models.heads import BACKBONE, HEADS
from pipeline.models.sources.base import BuildRequest, BuiltModel
from pipeline.models.state_dicts import rename_to_match, renamed

_NUM_QUOTED_NAMES = 4


def fit_heads(
    state: Mapping[str, Tensor], built: BuiltModel, request: BuildRequest
) -> tuple[Mapping[str, Tensor], tuple[str, ...], list[str]]:
    """The tensors under the names of the network, from weights with one classifier or with several heads.

    A head of the network gets the tensors of the head of its name. Other heads are left out. A student gets new, random
    heads in place of missing ones.

    Returns:
        The tensors, choices made on behalf of the user, and the names of the tensors that the weights lack.

    Raises:
        ModelError: a head of a teacher is missing.
    """
    expected = built.network.state_dict()
    if request.has_several_heads:
        adapted = _as_several_heads(state, expected)
    else:
        adapted = _as_one_head(state, expected, built, *request.classes_by_head)
    left_out = [name for name in adapted if _is_of_another_head(name, expected, built)]
    adapted = renamed(adapted, lambda name: None if name in left_out else name)
    missing = _missing_heads(adapted, expected, built)
    if missing and not request.allow_new_head:
        raise _no_classifier(request, missing)
    where, notes = f"{request.where}.weights", []
    if left_out:
        notes.append(f"{where}: tensors of other heads are left out ({_quoted(sorted(left_out))})")
    if missing:
        notes.append(f"{where}: no {_quoted(missing)} in the file; the student begins with random values for them")
        adapted.update((name, expected[name]) for name in missing)
    return adapted, tuple(notes), missing


def _as_several_heads(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Weights with one classifier get the names of a network with several heads."""
    backbone = {name.removeprefix(BACKBONE) for name in expected if name.startswith(BACKBONE)}
    same, bare = rename_to_match(state, expected.keys()), rename_to_match(state, backbone)
    if _num_shared(same, expected) >= _num_shared(bare, backbone):
        return same
    return renamed(bare, lambda name: f"{BACKBONE}{name}")


def _as_one_head(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], built: BuiltModel, head: str
) -> OrderedDict[str, Tensor]:
    """Weights with several heads get the names of a network with one classifier, which takes the head of its name if it
    is linear."""
    prefixed = {f"{BACKBONE}{name}" for name in expected}
    same, several = rename_to_match(state, expected.keys()), rename_to_match(state, prefixed)
    if _num_shared(same, expected) >= _num_shared(several, prefixed):
        return same
    adapted = renamed(several, lambda name: name.removeprefix(BACKBONE))
    if not all(isinstance(built.network.get_submodule(name), nn.Linear) for name in built.heads):
        return adapted  # a SqueezeNet has a ReLU after its last convolution
    prefix = f"{HEADS}{head}."
    for name in [name for name in adapted if name.startswith(prefix)]:
        tensor = adapted.pop(name)
        # A distilled ViT averages the outputs of its two classifiers, and its embedding is the average of their inputs.
        adapted.update((f"{classifier}.{name.removeprefix(prefix)}", tensor) for classifier in built.heads)
    return adapted


def _num_shared(state: Mapping[str, Tensor], names: Iterable[str]) -> int:
    return len(state.keys() & set(names))


def _is_of_another_head(name: str, expected: Mapping[str, Tensor], built: BuiltModel) -> bool:
    """Whether a tensor of the weights is of a head that the network lacks."""
    if name in expected:
        return False
    removed = getattr(built.network, "removed", ())
    return name.startswith((HEADS, *(f"{BACKBONE}{classifier}." for classifier in removed)))


def _missing_heads(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], built: BuiltModel) -> list[str]:
    """Names of the tensors of whole heads that the weights lack, if they have all other tensors."""
    heads = ([name for name in expected if name.startswith(f"{head}.")] for head in built.heads)
    missing = [name for names in heads if not state.keys() & set(names) for name in names]
    return missing if expected.keys() - set(missing) <= state.keys() else []


def _no_classifier(request: BuildRequest, missing: Sequence[str]) -> ModelError:
    return ModelError(
        "these weights have no classifier, so the teacher's logits would come from an untrained one",
        code="model.untrained-head",
        where=f"{request.where}.weights: {redact(str(request.config.weights))}",
        got=f"no {', '.join(sorted(missing))}",
        expected=f"weights with a classifier of {request.described_classes}",
        next_step="train a classifier on these classes and give the whole network's weights as a URL, or set "
        "data.task=embedding: such a network is a teacher of its embedding"
        + (f", or name the heads that they have in {request.where}.heads" if request.has_several_heads else ""),
    )


def _quoted(names: Sequence[str]) -> str:
    rest = ", …" if len(names) > _NUM_QUOTED_NAMES else ""
    return f"{', '.join(names[:_NUM_QUOTED_NAMES])}{rest}"
