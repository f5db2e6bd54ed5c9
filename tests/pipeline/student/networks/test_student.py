"""The student around a network: projectors to the teachers' widths, if the widths differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers.norm_act import SyncBatchNormAct
from torch import nn

from pipeline.models import EmbeddingModel, load_model
from pipeline.student.networks.freeze import freeze
from pipeline.student.networks.student import Student
from schemas.config import StudentConfig
from tests.pipeline.student.runs import NORMALISED, SMALL


def model(section: dict[str, Any]) -> EmbeddingModel:
    return load_model(StudentConfig.model_validate(section), widths={"logits": 10}, size=16, where="student").module


@pytest.mark.parametrize("width", [16, 7])
def test_the_embedding_comes_in_the_teachers_width(width: int) -> None:
    student = Student(model(SMALL), terms=["nd"], teacher_dims=[width])
    images = torch.rand(4, 3, 16, 16)
    outputs, projected, _ = student(images)
    (projected_BD,) = projected["nd"]
    torch.testing.assert_close(outputs, student.model(images))
    shapes = {name: values.shape for name, values in outputs.items()}
    assert (shapes, projected_BD.shape) == ({"logits": (4, 10), "embedding": (4, 16)}, (4, width))
    assert (not list(student.projectors.parameters())) == (width == 16)


def test_without_losses_on_embeddings_and_maps_a_student_has_only_the_parameters_of_its_network() -> None:
    student = Student(model(SMALL), teacher_dims=[7])
    outputs, projected, maps = student(torch.rand(4, 3, 16, 16))
    assert (outputs["embedding"].shape, projected, maps) == ((4, 16), {}, ())
    assert not [name for name in student.state_dict() if not name.startswith("model.network.")]
    assert student.min_rows == 1


def test_each_teacher_and_each_term_has_a_separate_projector() -> None:
    student = Student(model(SMALL), terms=["nd", "cosine"], teacher_dims=[7, 16, 7])
    outputs, projected, _ = student.eval()(torch.rand(4, 3, 16, 16))
    assert list(projected) == ["nd", "cosine"]
    for embeddings in projected.values():
        assert [projected_BD.shape[1] for projected_BD in embeddings] == [7, 16, 7]
        assert embeddings[1] is outputs["embedding"]
        assert not torch.equal(embeddings[0], embeddings[2])
    assert not torch.equal(projected["nd"][0], projected["cosine"][0])


def test_a_term_changes_only_its_projector() -> None:
    student = Student(model(SMALL), terms=["nd", "cosine"], teacher_dims=[7])
    _, projected, _ = student(torch.rand(4, 3, 16, 16))
    projected["cosine"][0].square().sum().backward()
    parameters = student.projectors.named_parameters()
    assert {name.partition(".")[0] for name, value in parameters if value.grad is not None} == {"cosine"}


@pytest.mark.parametrize(
    ("section", "teacher_dim", "rows"), [(SMALL, 16, 1), (NORMALISED, 16, 2), (SMALL, 7, 2)], ids=str
)
def test_the_minimum_of_rows_is_that_of_a_training_step(section: dict[str, Any], teacher_dim: int, rows: int) -> None:
    student = Student(model(section), terms=["nd"], teacher_dims=[teacher_dim]).train()
    assert student.min_rows == rows
    student(torch.rand(rows, 3, 16, 16))


@pytest.mark.parametrize(
    "section", [NORMALISED, {"model": "timm/test_efficientnet"}], ids=lambda section: section["model"]
)
def test_all_batch_norms_are_synchronised_with_the_same_tensors_and_outputs(section: dict[str, Any]) -> None:
    """Also those of projectors, and those of timm that apply an activation, which torch's conversion drops."""

    def build(*, sync_batch_norm: bool) -> Student:
        torch.manual_seed(0)
        return Student(model(section), terms=["nd"], teacher_dims=[7], sync_batch_norm=sync_batch_norm)

    plain, synchronised = build(sync_batch_norm=False), build(sync_batch_norm=True)
    norms = {
        name: type(module)
        for name, module in synchronised.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    assert norms.keys() == {
        name for name, module in plain.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    assert norms["projectors.nd.0.0"] is nn.SyncBatchNorm
    assert {*norms.values()} <= {nn.SyncBatchNorm, SyncBatchNormAct}
    # Without a process group they are BatchNorm, also in training.
    images = torch.rand(4, 3, 32, 32)
    for student in (plain, synchronised):
        student.train().projectors.eval()
    torch.testing.assert_close(synchronised(images), plain(images), rtol=0, atol=0)
    torch.testing.assert_close(synchronised.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert (plain.min_rows, synchronised.min_rows) == (2, 1)
    freeze(synchronised.model.network, [name for name, _ in synchronised.model.network.named_children()][:-1])
    assert not any(norm.training for norm in synchronised.model.modules() if isinstance(norm, nn.SyncBatchNorm))
