"""Patch tokens of a teacher: the positions of a layer's output, averaged over the windows of a coarser grid."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import avg_pool2d

from pipeline.core.errors import ConfigError
from pipeline.models import FeatureMap, LoadedModel, find_maps

DEFAULT_LAYER = "norm"
"""Of timm's ViTs: the last layer before the tokens are pooled, the identity where the pooled ones are normalised."""


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """Which tokens a config wants of a teacher.

    Attributes:
        layer: None: ``DEFAULT_LAYER``.
        grid: None: that of the layer.
        layer_key, grid_key: of the config, for messages.
    """

    layer: str | None
    grid: int | None
    layer_key: str
    grid_key: str

    def plan(self, loaded: LoadedModel) -> TokenPlan:
        """
        Raises:
            ModelError: the network has no such layer, or the layer's output has no positions.
            ConfigError: the grid does not divide that of the layer.
        """
        size = loaded.input.size
        (feature_map,) = find_maps(loaded.module, [self.layer or DEFAULT_LAYER], size=size, where=self.layer_key)
        side = feature_map.side
        if side % (self.grid or side):
            divisors = [str(number) for number in range(1, side + 1) if side % number == 0]
            raise ConfigError(
                "tokens can be pooled only to a grid whose side divides that of the layer",
                code="config.tokens-grid",
                where=self.grid_key,
                got=f"{self.grid}, and {feature_map.layer} has {side}×{side} positions at {size} pixels",
                expected=f"one of {', '.join(divisors)}, or null",
            )
        return TokenPlan(feature_map, self.grid or side)


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """The layer, and the side of the grid."""

    feature_map: FeatureMap
    grid: int

    @property
    def shape(self) -> tuple[int, int]:
        """(P, D)."""
        return self.grid**2, self.feature_map.channels

    def tokens(self, map_BDHW: Tensor) -> Tensor:
        """fp32 [B,P,D], in the order of pixels: position y · grid + x."""
        pooled_BDgg = avg_pool2d(map_BDHW.float(), self.feature_map.side // self.grid)
        return pooled_BDgg.flatten(2).transpose(1, 2).contiguous()
