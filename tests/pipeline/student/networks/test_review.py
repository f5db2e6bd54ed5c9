"""The fusion of ReviewKD against a float64 implementation of the paper; plans that are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline.models import FeatureMap, LoadedModel, load_model
from pipeline.student.networks.review import Review, ReviewPlan, plan_review, review_section
from pipeline.student.networks.student import Student
from schemas.config import Config, ReviewKdLoss, StudentConfig
from tests.errors import raises
from tests.pipeline.student.runs import SMALL

RESNET = {**SMALL, "model": "python:pipeline.models.cifar:resnet", "kwargs": {"depth": 8, "widths": [4, 4, 6, 7]}}
REVIEW: dict[str, Any] = {
    "name": "review_kd",
    "student_layers": ["conv1", "conv2"],
    "teacher_layers": ["layer2", "layer3"],
    "mid_channels": 5,
}


def section(**keys: Any) -> ReviewKdLoss:
    return ReviewKdLoss.model_validate({**REVIEW, **keys})


def loaded(model: dict[str, Any], size: int = 16) -> LoadedModel:
    return load_model(StudentConfig.model_validate(model), widths={"logits": 10}, size=size, where="student")


def feature_map(channels: int, side: int) -> FeatureMap:
    return FeatureMap(layer="any", channels=channels, side=side, layout="channels_first")


def plan(student: list[tuple[int, int]], teacher: list[tuple[int, int]], **keys: Any) -> ReviewPlan:
    """For maps given as (channels, side)."""
    options = {"embedding_dims": None, "mid_channels": 3, **keys}
    return ReviewPlan(
        student=tuple(feature_map(*shape) for shape in student),
        teacher=tuple(feature_map(*shape) for shape in teacher),
        **options,
    )


class Oracle:
    """The paper's fusion in float64 NumPy, with the weights of a module in training mode."""

    def __init__(self, review: Review) -> None:
        self.weights = {name: value.detach().numpy() for name, value in review.state_dict().items()}

    def normalised(self, x: np.ndarray, name: str) -> np.ndarray:
        mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
        scale, shift = (self.weights[f"{name}.{key}"].reshape(1, -1, 1, 1) for key in ("weight", "bias"))
        return scale * (x - mean) / np.sqrt(variance + 1e-5) + shift

    def conv1x1(self, x: np.ndarray, name: str) -> np.ndarray:
        return np.einsum("oc,bchw->bohw", self.weights[f"{name}.weight"][:, :, 0, 0], x)

    def conv3x3(self, x: np.ndarray, name: str) -> np.ndarray:
        padded, (height, width) = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), x.shape[2:]
        kernel = self.weights[f"{name}.weight"]
        shifts = [(row, column) for row in range(3) for column in range(3)]
        products = [
            np.einsum(
                "oc,bchw->bohw", kernel[:, :, row, column], padded[:, :, row : row + height, column : column + width]
            )
            for row, column in shifts
        ]
        return np.sum(products, axis=0)

    def level(
        self, number: int, x: np.ndarray, deeper: np.ndarray | None, teacher_side: int
    ) -> tuple[np.ndarray, np.ndarray]:
        name = f"fusions.{number}"
        x = self.normalised(self.conv1x1(x, f"{name}.reduce.0"), f"{name}.reduce.1")
        if deeper is not None:
            deeper = nearest(deeper, x.shape[2])
            bias = self.weights[f"{name}.choose.bias"].reshape(1, 2, 1, 1)
            z = 1 / (1 + np.exp(-self.conv1x1(np.concatenate([x, deeper], 1), f"{name}.choose") - bias))
            x = x * z[:, :1] + deeper * z[:, 1:]
        x = nearest(x, teacher_side)
        return self.normalised(self.conv3x3(x, f"{name}.expand.0"), f"{name}.expand.1"), x


def nearest(x: np.ndarray, side: int) -> np.ndarray:
    positions = [position * x.shape[2] // side for position in range(side)]
    return x[:, :, positions][:, :, :, positions]


def shapes(maps: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Without the batch."""
    return [tuple(map_BCHW.shape[1:]) for map_BCHW in maps]


def randomized(review: Review) -> Review:
    """In float64, with random values in every parameter, so that each parameter matters."""
    generator = torch.Generator().manual_seed(0)
    for parameter in review.double().parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return review.train()


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ([(4, 8), (6, 4), (5, 2)], [(3, 8), (2, 4), (7, 2)]),
        ([(4, 6), (6, 3), (5, 1)], [(3, 9), (2, 5), (7, 1)]),
        ([(4, 7), (6, 7)], [(3, 2), (2, 4)]),
        ([(4, 5)], [(3, 5)]),
    ],
    ids=["equal sides", "a teacher of larger maps", "a teacher of smaller maps", "one level"],
)
def test_the_fusion_is_the_papers(student: list[tuple[int, int]], teacher: list[tuple[int, int]]) -> None:
    review = randomized(Review(plan(student, teacher)))
    generator = torch.Generator().manual_seed(1)
    levels = [torch.randn(3, c, side, side, generator=generator, dtype=torch.float64) for c, side in student]
    oracle, deeper = Oracle(review), None
    expected: list[np.ndarray] = []
    for number in reversed(range(len(levels))):
        output, deeper = oracle.level(number, levels[number].numpy(), deeper, teacher[number][1])
        expected.insert(0, output)
    outputs = review(levels)
    assert shapes(outputs) == [(c, side, side) for c, side in teacher]
    for output, expected_output in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, torch.from_numpy(expected_output))


def test_a_shallow_output_depends_on_deep_levels_and_not_the_other_way_round() -> None:
    review = randomized(Review(plan([(4, 8), (6, 4)], [(3, 8), (2, 4)])))
    shallow, deep = torch.rand(2, 4, 8, 8).double(), torch.rand(2, 6, 4, 4).double()
    before, after = review([shallow, deep]), review([shallow, deep.flip(3)])
    assert not torch.allclose(before[0], after[0])
    torch.testing.assert_close(review([shallow.flip(3), deep])[1], before[1])


def test_the_embeddings_are_the_deepest_level() -> None:
    review = Review(plan([(4, 8)], [(3, 4)], embedding_dims=(9, 11)))
    levels = review.plan.levels([torch.rand(2, 4, 8, 8)], torch.rand(2, 9))
    assert shapes(review(levels)) == [(3, 4, 4), (11, 1, 1)]


def student_of(**keys: Any) -> tuple[Student, ReviewPlan]:
    student = loaded(SMALL)
    plan = plan_review(section(**keys), student, loaded(RESNET))
    return Student(student.module, terms=["nd"], teacher_dims=[student.module.embedding_dim], review=plan).train(), plan


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("embedding", [True, False])
def test_a_students_maps_have_the_shapes_of_the_teachers_levels(embedding: bool, autocast: bool) -> None:
    student, plan = student_of(embedding=embedding)
    assert student.min_rows == 2
    assert [(feature_map.channels, feature_map.side) for feature_map in plan.student] == [(8, 8), (16, 4)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        outputs = student(torch.rand(4, 3, 16, 16))
    (projected_BD,) = outputs.projected["nd"]
    assert (outputs.outputs["logits"].shape, projected_BD.shape) == ((4, 10), (4, 16))
    assert shapes(outputs.maps) == [(6, 8, 8), (7, 4, 4), (7, 1, 1)][: 2 + embedding]
    assert all(map_BCHW.isfinite().all() for map_BCHW in outputs.maps)


def test_the_students_levels_are_the_outputs_of_its_layers() -> None:
    student, _ = student_of()
    seen: list[tuple[Tensor, ...]] = []
    assert student.review is not None
    student.review.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    images, network = torch.rand(4, 3, 16, 16), student.model.network
    student(images)
    conv1 = network.conv1(images)
    for level, expected in zip(seen[0], [conv1, network.conv2(conv1.relu())], strict=False):
        torch.testing.assert_close(level, expected)
    torch.testing.assert_close(seen[0][2][:, :, 0, 0], student.model(images)["embedding"])


def test_everything_but_the_head_gets_a_gradient_from_the_maps() -> None:
    student, _ = student_of()
    *_, maps = student(torch.rand(4, 3, 16, 16))
    torch.stack([map_BCHW.square().sum() for map_BCHW in maps]).sum().backward()
    idle = {name for name, parameter in student.named_parameters() if parameter.grad is None}
    assert idle == {"model.network.fc.weight", "model.network.fc.bias"}


# At a graph break torch's compiler reads gradients of inner tensors; its filter comes after ours.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_student_has_the_same_outputs(backend: str) -> None:
    student, _ = student_of()
    images = torch.rand(4, 3, 16, 16)
    expected = student(images)
    outputs: Any = torch.compile(student, backend=backend)(images)
    torch.testing.assert_close(outputs[0], expected[0])
    torch.testing.assert_close(outputs.maps, expected.maps)


def test_an_unknown_layer_is_refused_with_its_key() -> None:
    for keys in ({"student_layers": ["conv1", "conv3"]}, {"teacher_layers": ["layer2", "layer4"]}):
        with raises("model.unknown-layer", where=f"{next(iter(keys))} of review_kd"):
            student_of(**keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"student_layers": ["conv1"]}, "1 student_layers and 2 teacher_layers; expected the same number"),
        ({"teacher_layers": ["layer2", "layer2"]}, "teacher_layers names a layer twice"),
        ({"student_layers": [], "teacher_layers": []}, "at least 1 item"),
    ],
)
def test_layers_come_in_pairs(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        section(**keys)


def test_a_second_review_is_refused() -> None:
    terms = Config.model_validate({"loss": [REVIEW, {"name": "kd"}, REVIEW]}).loss
    with raises("config.review-repeated"):
        review_section(terms)
    assert review_section(terms[1:2]) is None


def test_the_input_of_the_last_relu_of_a_cifar_block_has_a_name() -> None:
    """The paper compares a teacher's stage before its last ReLU. The named module has no weights."""
    network = loaded(RESNET).module.network
    preact = network.get_submodule("layer3.0.preact")
    assert isinstance(preact, nn.Identity)
    seen: dict[str, Tensor] = {}
    preact.register_forward_hook(lambda _module, _args, output: seen.update(before=output))
    network.get_submodule("layer3").register_forward_hook(lambda _module, _args, output: seen.update(after=output))
    with torch.no_grad():
        network(torch.randn(2, 3, 16, 16))
    assert (seen["before"] < 0).any()
    torch.testing.assert_close(seen["before"].relu(), seen["after"])
