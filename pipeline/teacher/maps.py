"""Logits at positions of an image, brought to the grid on which a cache stores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from pipeline.models.maps import to_grid
from pipeline.tasks.view_geometry import grid_size
from schemas.config import Size

_MAP_NDIM = 4


def map_sizes(outputs: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Height and width of the maps among the outputs, by name."""
    return {name: (tensor.shape[2], tensor.shape[3]) for name, tensor in outputs.items() if tensor.ndim == _MAP_NDIM}


@dataclass(frozen=True, slots=True)
class MapGrid:
    """The grid of all maps of a network.

    Attributes:
        stride: pixels of the input, along an axis, for each position.
        size: height and width of the grid.
    """

    stride: int
    size: tuple[int, int]

    @classmethod
    def of(cls, stride: int | None, size: Size) -> MapGrid | None:
        """None: the network returns no maps.

        Args:
            size: height and width of the input.
        """
        return None if stride is None else cls(stride, grid_size(size, stride))

    def apply(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs with maps on this grid."""
        return {
            name: to_grid(tensor, self.size) if tensor.ndim == _MAP_NDIM else tensor for name, tensor in outputs.items()
        }

    def notes(self, sizes: Mapping[str, tuple[int, int]], *, key: str) -> tuple[str, ...]:
        """How maps of other sizes change, for the user.

        Args:
            sizes: of the network's maps, by name.
            key: of the config that sets the stride.
        """
        return tuple(self._note(name, size, key) for name, size in sizes.items() if size != self.size)

    def _note(self, name: str, size: tuple[int, int], key: str) -> str:
        num, num_stored = prod(size), prod(self.size)
        change = (
            f"each is the mean of {num / num_stored:.3g}; a smaller {key} stores more of them"
            if num > num_stored
            else f"interpolated: {num_stored / num:.3g} times the bytes with nothing more in them; a larger {key} "
            "stores the same in less"
        )
        at = f"{key}={self.stride}: the teacher's {name} have {size[0]}×{size[1]} positions"
        return f"{at}, and are stored at {self.size[0]}×{self.size[1]}, {change}"
