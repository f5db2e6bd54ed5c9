"""The student's patch tokens on the grid and in the width of a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pipeline.models import FeatureMap, LoadedModel, find_maps


def token_maps(layers: Mapping[str, str], student: LoadedModel) -> dict[str, FeatureMap]:
    """The maps whose positions are the student's tokens.

    Args:
        layers: by the key of each term that compares tokens.

    Raises:
        ModelError: the network has no such layer, or its output has no positions.
    """
    size = student.input.size
    return {
        key: find_maps(student.module, [layer], size=size, where=f"student_layer of {key}")[0]
        for key, layer in layers.items()
    }


class TokenProjector(nn.Module):
    """forward(map_BCSS) -> [B,P,D]: the student's map on a teacher's grid, position by position in its width.

    Bilinear resampling, antialiased where the grid is coarser, as two matrix products, whose gradients are
    deterministic on GPUs. Then LayerNorm and Linear; nothing if the widths are equal.

    Args:
        shape: (P, D) of the teacher's tokens.
    """

    def __init__(self, student: FeatureMap, shape: tuple[int, int]) -> None:
        super().__init__()
        num_tokens, width = shape
        self.resamples = student.side != isqrt(num_tokens)
        # A function of the two networks, no state of the training.
        self.weight_GS = nn.Buffer(resampling_weights(student.side, isqrt(num_tokens)), persistent=False)
        self.project = (
            nn.Identity()
            if student.channels == width
            else nn.Sequential(nn.LayerNorm(student.channels), nn.Linear(student.channels, width))
        )

    def forward(self, map_BCSS: Tensor) -> Tensor:
        if self.resamples:
            map_BCSS = (map_BCSS @ self.weight_GS.T).transpose(2, 3)
            map_BCSS = (map_BCSS @ self.weight_GS.T).transpose(2, 3)
        return self.project(map_BCSS.flatten(2).transpose(1, 2))


def resampling_weights(side: int, grid: int) -> Tensor:
    """fp32 [G,S]: the weights of S positions in a line of G."""
    eye_11SS = torch.eye(side, dtype=torch.float64)[None, None]
    return interpolate(eye_11SS, (grid, side), mode="bilinear", antialias=True)[0, 0].float()
