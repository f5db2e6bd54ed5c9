"""Maps on the grid of a cache: means of finer ones, interpolation of coarser ones, and what a note reports of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.models.maps import to_grid
from pipeline.tasks.view_geometry import grid_size
from pipeline.teacher.maps import MapGrid, map_sizes


@pytest.mark.parametrize(
    ("size", "stride", "expected"), [((512, 1024), 8, (64, 128)), (321, 8, (41, 41)), ((5, 9), 16, (1, 1))]
)
def test_a_grid_has_a_position_for_each_stride_begun(
    size: int | tuple[int, int], stride: int, expected: tuple[int, int]
) -> None:
    assert grid_size(size, stride) == expected


def test_a_map_of_the_grid_does_not_change() -> None:
    logits = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_grid(logits, (4, 6)), logits)


def test_a_finer_map_has_the_mean_of_each_cell() -> None:
    logits = torch.randn(2, 3, 4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = logits.numpy().reshape(2, 3, 2, 2, 3, 4).mean((3, 5))
    # A sum of eight numbers, and a quotient.
    bound = 9 * 2.0**-24 * np.abs(logits.numpy()).max()
    np.testing.assert_allclose(to_grid(logits, (2, 3)).numpy(), expected, rtol=0, atol=bound)


def test_a_coarser_map_is_bilinear_between_the_centres_of_its_positions() -> None:
    """Two positions on four: centres at 1/8, 3/8, 5/8, 7/8 between those at 1/4 and 3/4; beyond these the nearest."""
    on_grid = to_grid(torch.tensor([0.0, 8.0]).reshape(1, 1, 1, 2), (1, 4))
    assert on_grid.flatten().tolist() == [0.0, 2.0, 6.0, 8.0]


def test_each_axis_is_finer_or_coarser_by_itself() -> None:
    logits = torch.tensor([[0.0, 8.0], [2.0, 10.0]]).reshape(1, 1, 2, 2)
    assert to_grid(logits, (1, 4)).flatten().tolist() == [1.0, 3.0, 7.0, 9.0]


def test_outputs_without_positions_do_not_change() -> None:
    outputs = {"logits": torch.ones(1, 3, 4, 4), "embedding": torch.ones(1, 5), "tokens": torch.ones(1, 2, 5)}
    grid = MapGrid.of(8, 16)
    assert grid is not None
    shapes = {name: tuple(tensor.shape) for name, tensor in grid.apply(outputs).items()}
    assert shapes == {"logits": (1, 3, 2, 2), "embedding": (1, 5), "tokens": (1, 2, 5)}
    assert map_sizes(outputs) == {"logits": (4, 4)}
    assert MapGrid.of(None, 16) is None


def test_a_note_has_the_figures_of_a_change() -> None:
    grid = MapGrid(8, (64, 128))
    assert grid.notes({"logits": (64, 128)}, key="cache.grid") == ()
    (finer,) = grid.notes({"logits": (128, 256)}, key="cache.grid")
    assert "cache.grid=8" in finer
    assert "128×256 positions" in finer
    assert "the mean of 4;" in finer
    (coarser,) = grid.notes({"logits": (16, 32)}, key="cache.grid")
    assert "16×32 positions" in coarser
    assert "interpolated: 16 times the bytes" in coarser
