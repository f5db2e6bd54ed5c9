"""Feature maps of any network, by layer name: a trial forward pass finds their layouts; hooks capture them later."""

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
from schemas.config import Size, size_text

Layout = Literal["channels_first", "channels_last", "tokens"]
P = ParamSpec("P")
T = TypeVar("T")

# The outputs of hooked layers in the forward that is running; ``embedding.py`` explains why it is a context variable.
_recorded: ContextVar[dict[str, Tensor] | None] = ContextVar("recorded layer outputs", default=None)

_NUM_SUGGESTED_LAYERS = 6
# A class and a distillation token, or a class token and four registers.
_MAX_PREFIX_TOKENS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureMap:
    """The output of a layer, and its layout as a map [B,C,H,W].

    Attributes:
        layer: dotted name, as in ``network.named_modules()``.
        channels: C.
        side: H and W, in positions.
        layout: ``channels_first`` [B,C,H,W], ``channels_last`` [B,H,W,C] (Swin) or ``tokens`` [B,N,C] (ViT).
        num_prefix_tokens: tokens before those of the grid (class, distillation, registers).
        overwritten: a later layer changes the output in place, as a ReLU may, so the hook copies it.
    """

    layer: str
    channels: int
    side: int
    layout: Layout
    num_prefix_tokens: int = 0
    overwritten: bool = False

    def to_map(self, output: Tensor) -> Tensor:
        """The layer's output as a map [B,C,H,W], without a copy."""
        if self.layout == "channels_first":
            return output
        if self.layout == "channels_last":
            return output.permute(0, 3, 1, 2)
        return output[:, self.num_prefix_tokens :].transpose(1, 2).unflatten(2, (self.side, self.side))


def register_map_hooks(network: nn.Module, maps: Sequence[FeatureMap]) -> None:
    """Registers hooks that let ``forward_with_maps`` capture these layers. Once per network."""
    for feature_map in maps:
        network.get_submodule(feature_map.layer).register_forward_hook(partial(_record, feature_map))


def _record(feature_map: FeatureMap, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
    recorded = _recorded.get()
    if recorded is not None:
        recorded[feature_map.layer] = output.clone() if feature_map.overwritten else output


def forward_with_maps(
    maps: Sequence[FeatureMap], forward: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> tuple[T, tuple[Tensor, ...]]:
    """Runs ``forward(*args, **kwargs)``, of a network with registered hooks. It may call this function itself.

    Returns:
        Its outputs, and the maps [B,C,H,W], with gradient if the forward has one.
    """
    if not maps:
        return forward(*args, **kwargs), ()
    recorded: dict[str, Tensor] = {}
    outer, token = _recorded.get(), _recorded.set(recorded)
    try:
        outputs = forward(*args, **kwargs)
    finally:
        _recorded.reset(token)
    if outer is not None:
        outer |= recorded
    return outputs, tuple(feature_map.to_map(recorded[feature_map.layer]) for feature_map in maps)


def find_maps(model: EmbeddingModel, layers: Sequence[str], *, size: Size, where: str) -> tuple[FeatureMap, ...]:
    """The layouts of the outputs of these layers, from a forward of two images of ``size`` pixels.

    Images and maps are square. An output of four dimensions is [B,C,H,W] if its last two are equal, else [B,H,W,C] if
    its middle two are. An output of three dimensions is [B,N,C]: prefix tokens, then a grid. The number of prefix
    tokens is that of the network (``num_prefix_tokens``, as in timm), else N minus the largest square; at most five.

    Args:
        model: in eval mode.
        layers: dotted names, shallow to deep.
        where: YAML key, for messages.

    Raises:
        ModelError: a layer does not exist, does not run exactly once, or its output is not a map; the layers run in
            another order; or the images are no squares.
    """
    if not isinstance(size, int):
        raise ModelError(
            "feature maps and patch tokens need square images",
            code="model.maps-need-square",
            where=where,
            got=f"images of {size_text(size)} pixels",
            next_step="set one number as the size of teacher and student, or leave out what reads maps or tokens",
        )
    assert not model.training, "the trial forward pass must not change statistics"
    unknown = [layer for layer in layers if layer not in _layer_names(model)]
    if unknown:
        raise _unknown_layer(model, unknown[0], size, where)
    runs = _run_layers(model, layers, size)
    for layer in layers:
        _check_runs_once(layer, sum(run.layer == layer for run in runs), where)
    _check_order(layers, [run.layer for run in runs], where)
    return tuple(_require_map(run, model, size, where) for run in runs)


@dataclass(frozen=True, slots=True)
class _LayerRun:
    """One output of a layer, and its version (of torch's in-place counter) when the layer returned it."""

    layer: str
    output: object
    version: int

    @property
    def overwritten(self) -> bool:
        return isinstance(self.output, Tensor) and self.output._version != self.version


def _layer_names(model: EmbeddingModel) -> list[str]:
    return [name for name, _ in model.network.named_modules() if name]


@torch.no_grad()
def _run_layers(model: EmbeddingModel, layers: Sequence[str], size: int) -> list[_LayerRun]:
    """The outputs of these layers for two images, in the order in which the layers return."""
    runs: list[_LayerRun] = []

    def record(layer: str, _module: nn.Module, _args: tuple[Any, ...], output: object) -> None:
        runs.append(_LayerRun(layer, output, output._version if isinstance(output, Tensor) else 0))

    handles = [model.network.get_submodule(layer).register_forward_hook(partial(record, layer)) for layer in layers]
    try:
        model(torch.zeros(2, 3, size, size, device=next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return runs


def _as_map(run: _LayerRun, network: nn.Module) -> FeatureMap | None:
    """The layout of the output; None if it is not a map."""
    shape = tuple(run.output.shape) if isinstance(run.output, Tensor) else ()
    feature_map = partial(FeatureMap, layer=run.layer, overwritten=run.overwritten)
    match shape:
        case (2, channels, height, width) if height == width:
            return feature_map(channels=channels, side=height, layout="channels_first")
        case (2, height, width, channels) if height == width:
            return feature_map(channels=channels, side=height, layout="channels_last")
        case (2, num_tokens, channels):
            return _as_token_map(feature_map, num_tokens, channels, network)
        case _:
            return None


def _as_token_map(
    feature_map: Callable[..., FeatureMap], num_tokens: int, channels: int, network: nn.Module
) -> FeatureMap | None:
    declared = getattr(network, "num_prefix_tokens", None)
    # Layers before the prefix is added (a patch embedding) have no prefix tokens.
    candidates = (declared, 0) if isinstance(declared, int) else (num_tokens - isqrt(num_tokens) ** 2,)
    for prefix in candidates:
        grid = num_tokens - prefix
        if prefix <= _MAX_PREFIX_TOKENS and grid > 0 and isqrt(grid) ** 2 == grid:
            return feature_map(channels=channels, side=isqrt(grid), layout="tokens", num_prefix_tokens=prefix)
    return None


def _require_map(run: _LayerRun, model: EmbeddingModel, size: int, where: str) -> FeatureMap:
    feature_map = _as_map(run, model.network)
    if feature_map is not None:
        return feature_map
    shape = list(run.output.shape) if isinstance(run.output, Tensor) else type(run.output).__name__
    raise ModelError(
        f"the output of {run.layer} is not a feature map",
        code="model.not-a-feature-map",
        where=where,
        got=f"{shape}, for 2 images of {size}×{size} pixels",
        expected="[B,C,H,W] or [B,H,W,C] with H = W, or [B,N,C] with a square number of tokens",
        next_step=f"name another layer, such as {_suggest_layers(model, size)}",
    )


def _unknown_layer(model: EmbeddingModel, layer: str, size: int, where: str) -> ModelError:
    near = difflib.get_close_matches(layer, _layer_names(model), n=3, cutoff=0.5)
    return ModelError(
        "the network has no layer of this name",
        code="model.unknown-layer",
        where=where,
        got=layer,
        expected=f"one of {', '.join(near)}, …" if near else "a name of network.named_modules(); none is similar",
        next_step=f"name layers whose output is a map, such as {_suggest_layers(model, size)}",
    )


def _suggest_layers(model: EmbeddingModel, size: int) -> str:
    """The last block of each side, with its shape, shallow to deep; for a single side its blocks."""
    maps = _all_maps(model, size)
    by_side: dict[int, FeatureMap] = {}
    for candidate in maps:
        best = by_side.get(candidate.side)
        if best is None or _rank(model, candidate) <= _rank(model, best):
            by_side[candidate.side] = candidate
    suggested = list(by_side.values())
    if len(suggested) == 1:
        parent = suggested[0].layer
        suggested = [candidate for candidate in maps if candidate.layer.rpartition(".")[0] == parent] or suggested
    shapes = [f"{item.layer} [{item.channels},{item.side},{item.side}]" for item in suggested]
    return ", ".join(shapes[-_NUM_SUGGESTED_LAYERS:]) or "none: no layer of this network outputs a map"


def _all_maps(model: EmbeddingModel, size: int) -> list[FeatureMap]:
    """The maps of all layers that run once, in the order in which they return, without pooled ones."""
    runs = _run_layers(model, _layer_names(model), size)
    num_runs = Counter(run.layer for run in runs)
    maps = [_as_map(run, model.network) for run in runs if num_runs[run.layer] == 1]
    return [feature_map for feature_map in maps if feature_map is not None and feature_map.side > 1]


def _rank(model: EmbeddingModel, feature_map: FeatureMap) -> tuple[bool, int]:
    """Blocks before single operations, outer blocks before inner ones."""
    layer = model.network.get_submodule(feature_map.layer)
    return not any(layer.children()), feature_map.layer.count(".")


def _check_runs_once(layer: str, num_runs: int, where: str) -> None:
    if num_runs == 1:
        return
    raise ModelError(
        f"{layer} runs {num_runs} times in one forward, so its output is not unique",
        code="model.layer-not-run-once",
        where=where,
        got=layer,
        expected="a layer that runs once",
        next_step="name the block around it" if num_runs else "name a layer that the forward uses",
    )


def _check_order(layers: Sequence[str], run_order: Sequence[str], where: str) -> None:
    if list(layers) != list(run_order):
        raise ModelError(
            "these layers are not listed shallow to deep",
            code="model.layer-order",
            where=where,
            got=", ".join(layers),
            expected=f"{', '.join(run_order)}: the order in which they run",
            next_step="reorder the list, and that of the other network in the same way",
        )
