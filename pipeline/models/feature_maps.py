"""Feature maps of any network, named by layer: found by one dry forward, captured in every later one."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from pipeline.core.errors import ModelError
from pipeline.models.embedding import EmbeddingModel

Layout = Literal["channels_first", "channels_last", "tokens"]
_Asked = ParamSpec("_Asked")
_Answer = TypeVar("_Answer")

# Where the running forward puts the outputs of observed layers; the reasons for a context variable are those of
# ``pipeline/models/embedding.py``.
_recorded: ContextVar[dict[str, Tensor] | None] = ContextVar("recorded layer outputs", default=None)

_NUM_LAYERS_NAMED = 6
# A class and a distillation token, or a class token and four registers. An output with more is of another kind.
_MAX_PREFIX_TOKENS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureMap:
    """How the output of a layer is read as a map [B,C,H,W].

    Attributes:
        layer: dotted name, as in ``network.named_modules()``.
        channels: C.
        side: H and W, in positions.
        layout: ``channels_first`` [B,C,H,W], ``channels_last`` [B,H,W,C] (Swin) or ``tokens`` [B,N,C] (ViT).
        num_prefix_tokens: tokens in front of the grid's (class, distillation, registers).
        overwritten: the forward changes the output in place later on, as a ReLU may, so it is copied when it is made.
    """

    layer: str
    channels: int
    side: int
    layout: Layout
    num_prefix_tokens: int = 0
    overwritten: bool = False

    def of(self, output: Tensor) -> Tensor:
        """The layer's output as a map [B,C,H,W], without a copy."""
        if self.layout == "channels_first":
            return output
        if self.layout == "channels_last":
            return output.permute(0, 3, 1, 2)
        return output[:, self.num_prefix_tokens :].transpose(1, 2).unflatten(2, (self.side, self.side))


def register_map_hooks(network: nn.Module, maps: Sequence[FeatureMap]) -> None:
    """Lets ``forward_with_maps`` see these layers. Once per network; without ``forward_with_maps`` it does nothing."""
    for feature_map in maps:
        network.get_submodule(feature_map.layer).register_forward_hook(partial(_record, feature_map))


def _record(feature_map: FeatureMap, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
    recorded = _recorded.get()
    if recorded is not None:
        recorded[feature_map.layer] = output.clone() if feature_map.overwritten else output


def forward_with_maps(
    maps: Sequence[FeatureMap], forward: Callable[_Asked, _Answer], *args: _Asked.args, **kwargs: _Asked.kwargs
) -> tuple[_Answer, tuple[Tensor, ...]]:
    """What a forward of an observed network answers, and its maps [B,C,H,W], with whatever gradient they have."""
    if not maps:
        return forward(*args, **kwargs), ()
    recorded: dict[str, Tensor] = {}
    token = _recorded.set(recorded)
    try:
        answer = forward(*args, **kwargs)
    finally:
        _recorded.reset(token)
    return answer, tuple(feature_map.of(recorded[feature_map.layer]) for feature_map in maps)


def find_maps(model: EmbeddingModel, layers: Sequence[str], *, size: int, where: str) -> tuple[FeatureMap, ...]:
    """How the outputs of these layers are maps, proven by a forward of two images of ``size`` pixels.

    Images are square, and so are maps. An output of four dimensions is [B,C,H,W] where its last two agree, else
    [B,H,W,C] where its middle two do. One of three is [B,N,C], a grid of tokens after as many others as the network
    says (``num_prefix_tokens``, as timm's do), or as are left over from the largest square; five at most.

    Args:
        model: in eval mode.
        layers: dotted names, shallow to deep.
        where: key of the YAML, for messages.

    Raises:
        ModelError: there is no layer of a name, its output is no map, or the layers do not run once each in this order.
    """
    assert not model.training, "a dry forward must leave statistics as they are"
    unknown = [layer for layer in layers if layer not in _names(model)]
    if unknown:
        raise _unknown(model, unknown[0], size, where)
    runs = _runs(model, layers, size)
    for layer in layers:
        _check_runs_once(layer, [run for run in runs if run.layer == layer], where)
    _check_order(layers, [run.layer for run in runs], where)
    return tuple(_found(run, model, size, where) for run in runs)


@dataclass(frozen=True, slots=True)
class _Run:
    """One output of a layer, and whether the rest of the forward changed it in place."""

    layer: str
    output: object
    version: int

    @property
    def overwritten(self) -> bool:
        return isinstance(self.output, Tensor) and self.output._version != self.version


def _names(model: EmbeddingModel) -> list[str]:
    return [name for name, _ in model.network.named_modules() if name]


@torch.no_grad()
def _runs(model: EmbeddingModel, layers: Sequence[str], size: int) -> list[_Run]:
    """What these layers answer to two images, in the order in which they end."""
    runs: list[_Run] = []

    def note(layer: str, _module: nn.Module, _args: tuple[Any, ...], output: object) -> None:
        runs.append(_Run(layer, output, output._version if isinstance(output, Tensor) else 0))

    handles = [model.network.get_submodule(layer).register_forward_hook(partial(note, layer)) for layer in layers]
    try:
        model(torch.zeros(2, 3, size, size, device=next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return runs


def _read(run: _Run, network: nn.Module) -> FeatureMap | None:
    """The output as a map; None where it is none."""
    shape = tuple(run.output.shape) if isinstance(run.output, Tensor) else ()
    known = partial(FeatureMap, layer=run.layer, overwritten=run.overwritten)
    match shape:
        case (2, channels, height, width) if height == width:
            return known(channels=channels, side=height, layout="channels_first")
        case (2, height, width, channels) if height == width:
            return known(channels=channels, side=height, layout="channels_last")
        case (2, num_tokens, channels):
            return _read_tokens(known, num_tokens, channels, network)
        case _:
            return None


def _read_tokens(
    known: Callable[..., FeatureMap], num_tokens: int, channels: int, network: nn.Module
) -> FeatureMap | None:
    told = getattr(network, "num_prefix_tokens", None)
    # The network's own word first; its layers before the prefix is put on (a patch embedding) have none of it.
    candidates = (told, 0) if isinstance(told, int) else (num_tokens - isqrt(num_tokens) ** 2,)
    for prefix in candidates:
        grid = num_tokens - prefix
        if prefix <= _MAX_PREFIX_TOKENS and grid > 0 and isqrt(grid) ** 2 == grid:
            return known(channels=channels, side=isqrt(grid), layout="tokens", num_prefix_tokens=prefix)
    return None


def _found(run: _Run, model: EmbeddingModel, size: int, where: str) -> FeatureMap:
    found = _read(run, model.network)
    if found is not None:
        return found
    shape = list(run.output.shape) if isinstance(run.output, Tensor) else type(run.output).__name__
    raise ModelError(
        f"the output of {run.layer} is no feature map",
        where=where,
        got=f"{shape}, of 2 images of {size}×{size} pixels",
        expected="[B,C,H,W] or [B,H,W,C] with H = W, or [B,N,C] with a square number of tokens",
        next_step=f"name another layer, such as {_candidates(model, size)}",
    )


def _unknown(model: EmbeddingModel, layer: str, size: int, where: str) -> ModelError:
    near = difflib.get_close_matches(layer, _names(model), n=3, cutoff=0.5)
    return ModelError(
        "the network has no layer of this name",
        where=where,
        got=layer,
        expected=f"one of {', '.join(near)}, …" if near else "a name of network.named_modules(); none is near this one",
        next_step=f"name layers that answer with maps, such as {_candidates(model, size)}",
    )


def _candidates(model: EmbeddingModel, size: int) -> str:
    """The last block of each side, with its shape, shallow to deep; where there is one side alone, its blocks."""
    found = _all_maps(model, size)
    by_side: dict[int, FeatureMap] = {}
    for one in found:
        known = by_side.get(one.side)
        if known is None or _rank(model, one) <= _rank(model, known):
            by_side[one.side] = one
    named = list(by_side.values())
    if len(named) == 1:
        named = [one for one in found if one.layer.rpartition(".")[0] == named[0].layer] or named
    told = [f"{one.layer} [{one.channels},{one.side},{one.side}]" for one in named[-_NUM_LAYERS_NAMED:]]
    return ", ".join(told) or "none: no layer of this network answers with a map"


def _all_maps(model: EmbeddingModel, size: int) -> list[FeatureMap]:
    """Of all layers that run once, in the order in which they end; pooled ones are left out."""
    runs = _runs(model, _names(model), size)
    times = Counter(run.layer for run in runs)
    read = [_read(run, model.network) for run in runs if times[run.layer] == 1]
    return [one for one in read if one is not None and one.side > 1]


def _rank(model: EmbeddingModel, one: FeatureMap) -> tuple[bool, int]:
    """Blocks before single operations, outer before inner ones."""
    layer = model.network.get_submodule(one.layer)
    return not any(layer.children()), one.layer.count(".")


def _check_runs_once(layer: str, runs: Sequence[_Run], where: str) -> None:
    if len(runs) == 1:
        return
    raise ModelError(
        f"{layer} runs {len(runs)} times in one forward, so it has not one output",
        where=where,
        got=layer,
        expected="a layer that runs once",
        next_step="name the block around it" if runs else "name a layer that the forward goes through",
    )


def _check_order(layers: Sequence[str], ran: Sequence[str], where: str) -> None:
    if list(layers) != list(ran):
        raise ModelError(
            "these layers are not listed shallow to deep",
            where=where,
            got=", ".join(layers),
            expected=f"{', '.join(ran)}: the order in which they run",
            next_step="reorder the list, and the other network's with it",
        )
