"""The student's patch tokens: resampled to a teacher's grid, projected to its width."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.models import FeatureMap, find_maps
from pipeline.student.networks.review import ReviewPlan
from pipeline.student.networks.student import Student
from pipeline.student.networks.tokens import TokenProjector
from tests.pipeline.student.networks.test_student import model
from tests.pipeline.student.runs import SMALL
from tests.tolerances import ulps


def feature_map(side: int, channels: int) -> FeatureMap:
    return FeatureMap(layer="layer", channels=channels, side=side, layout="channels_first")


def triangle_weights(side: int, grid: int) -> NDArray[np.float64]:
    """[G,S]: a triangle over each position of the grid, as wide as two of the coarser positions, normalised."""
    scale = side / grid
    support = max(scale, 1.0)
    weight_GS = np.zeros((grid, side))
    for g in range(grid):
        centre = (g + 0.5) * scale
        for s in range(side):
            weight_GS[g, s] = max(0.0, 1 - abs(s + 0.5 - centre) / support)
        weight_GS[g] /= weight_GS[g].sum()
    return weight_GS


@pytest.mark.parametrize(("side", "grid"), [(8, 4), (4, 8), (7, 3), (3, 7), (5, 1), (1, 4), (14, 16)])
def test_resampling_equals_a_float64_loop_over_triangles_in_the_order_of_pixels(side: int, grid: int) -> None:
    map_BCSS = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    expected = np.zeros((2, grid * grid, 3))
    weight_GS = triangle_weights(side, grid)
    for y in range(grid):
        for x in range(grid):
            expected[:, y * grid + x] = np.einsum("bcij,i,j->bc", map_BCSS.double(), weight_GS[y], weight_GS[x])
    found = TokenProjector(feature_map(side, 3), (grid * grid, 3))(map_BCSS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=ulps(2 * side + 4, 4.0))


def test_equal_grids_and_widths_need_neither_weights_nor_parameters() -> None:
    projector = TokenProjector(feature_map(3, 4), (9, 4))
    map_BCSS = torch.randn(2, 4, 3, 3)
    assert torch.equal(projector(map_BCSS), map_BCSS.flatten(2).transpose(1, 2))
    assert list(projector.state_dict()) == []
    other = TokenProjector(feature_map(2, 4), (9, 6))
    assert list(other.state_dict()) == ["project.0.weight", "project.0.bias", "project.1.weight", "project.1.bias"]
    assert other(torch.randn(2, 4, 2, 2)).shape == (2, 9, 6)


def test_a_student_returns_tokens_for_each_term_and_teacher_beside_embeddings_and_fused_maps() -> None:
    network = model(SMALL)
    conv1, conv2 = find_maps(network, ["conv1", "conv2"], size=16, where="a test")
    review = ReviewPlan(student=(conv1, conv2), teacher=(conv1, conv2), embedding_dims=None, mid_channels=3)
    student = Student(
        network,
        terms=["cosine"],
        teacher_dims=[7, 16],
        token_maps={"token_mse": conv2, "token_cosine": conv1},
        teacher_tokens=[(4, 7), (16, 16)],
        review=review,
    ).eval()
    images_BCHW = torch.rand(3, 3, 16, 16)
    outputs, projected, maps = student(images_BCHW)
    shapes = {term: [tuple(tokens.shape) for tokens in by_teacher] for term, by_teacher in projected.items()}
    assert shapes == {
        "cosine": [(3, 7), (3, 16)],
        "token_mse": [(3, 4, 7), (3, 16, 16)],
        "token_cosine": [(3, 4, 7), (3, 16, 16)],
    }
    assert [tuple(level.shape) for level in maps] == [(3, 8, 8, 8), (3, 16, 4, 4)]
    # On the same grid and in the same width they are the positions of the layer.
    deep_BCHW: Tensor = network.network.conv2(torch.relu(network.network.conv1(images_BCHW)))
    torch.testing.assert_close(projected["token_mse"][1], deep_BCHW.flatten(2).transpose(1, 2))
    assert torch.equal(outputs["embedding"], network(images_BCHW)["embedding"])
    sum(tokens.square().sum() for tokens in projected["token_cosine"]).backward()
    assert network.network.conv1.weight.grad is not None
    trained = {name for name, value in student.projectors.named_parameters() if value.grad is not None}
    assert {name.partition(".")[0] for name in trained} == {"token_cosine"}
