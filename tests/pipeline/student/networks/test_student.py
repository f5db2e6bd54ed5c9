"""The student around a network: a bridge to the teacher's width where there must be one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.models import EmbeddingModel, load_model
from pipeline.student.networks.student import Student
from schemas.config import StudentConfig
from tests.pipeline.student.runs import NORMALISED, SMALL


def model(section: dict[str, Any]) -> EmbeddingModel:
    return load_model(StudentConfig.model_validate(section), num_classes=10, size=16, where="student").module


@pytest.mark.parametrize("width", [16, 7])
def test_the_embedding_comes_in_the_teachers_width(width: int) -> None:
    student = Student(model(SMALL), terms=["nd"], teacher_dims=[width])
    logits_BK, own_BD, projected, _ = student(torch.rand(4, 3, 16, 16))
    (embedding_BD,) = projected["nd"]
    assert (logits_BK.shape, own_BD.shape, embedding_BD.shape) == ((4, 10), (4, 16), (4, width))
    assert (not list(student.projectors.parameters())) == (width == 16)


def test_without_a_term_that_takes_it_nothing_is_projected() -> None:
    student = Student(model(SMALL), teacher_dims=[7])
    _, own_BD, projected, _ = student(torch.rand(4, 3, 16, 16))
    assert (own_BD.shape, projected) == ((4, 16), {})
    assert student.min_rows == 1


def test_each_teacher_and_each_term_has_a_bridge_of_its_own() -> None:
    student = Student(model(SMALL), terms=["nd", "cosine"], teacher_dims=[7, 16, 7])
    _, own_BD, projected, _ = student.eval()(torch.rand(4, 3, 16, 16))
    assert list(projected) == ["nd", "cosine"]
    for embeddings in projected.values():
        assert [embedding_BD.shape[1] for embedding_BD in embeddings] == [7, 16, 7]
        assert embeddings[1] is own_BD
        assert not torch.equal(embeddings[0], embeddings[2])
    assert not torch.equal(projected["nd"][0], projected["cosine"][0])


def test_what_one_term_asks_of_its_projector_leaves_another_terms_alone() -> None:
    student = Student(model(SMALL), terms=["nd", "cosine"], teacher_dims=[7])
    _, _, projected, _ = student(torch.rand(4, 3, 16, 16))
    projected["cosine"][0].square().sum().backward()
    asked = {name.partition(".")[0] for name, one in student.projectors.named_parameters() if one.grad is not None}
    assert asked == {"cosine"}


def test_a_projector_leaves_the_networks_logits_as_they_are() -> None:
    network, images = model(SMALL), torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(Student(network, terms=["nd"], teacher_dims=[7])(images)[0], network(images)[0])


@pytest.mark.parametrize(
    ("section", "teacher_dim", "rows"), [(SMALL, 16, 1), (NORMALISED, 16, 2), (SMALL, 7, 2)], ids=str
)
def test_a_student_asks_for_as_many_rows_as_it_can_train_on(
    section: dict[str, Any], teacher_dim: int, rows: int
) -> None:
    student = Student(model(section), terms=["nd"], teacher_dims=[teacher_dim]).train()
    assert student.min_rows == rows
    student(torch.rand(rows, 3, 16, 16))


def test_batchnorm_on_one_value_is_what_the_rule_is_for() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm1d(3).train()(torch.rand(1, 3))
