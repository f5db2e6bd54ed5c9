"""The student around a network: a bridge to the teacher's width where there must be one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.models import EmbeddingModel, load_model
from pipeline.student.network import Student
from schemas.config import StudentConfig
from tests.pipeline.student.runs import NORMALISED, SMALL


def model(section: dict[str, Any]) -> EmbeddingModel:
    return load_model(StudentConfig.model_validate(section), num_classes=10, size=16, where="student").module


@pytest.mark.parametrize(("teacher_dim", "width"), [(None, 16), (16, 16), (7, 7)])
def test_the_embedding_comes_in_the_teachers_width(teacher_dim: int | None, width: int) -> None:
    student = Student(model(SMALL), teacher_dims=[teacher_dim])
    logits_BK, (embedding_BD,), _ = student(torch.rand(4, 3, 16, 16))
    assert (logits_BK.shape, embedding_BD.shape) == ((4, 10), (4, width))
    assert (not list(student.projectors.parameters())) == (width == 16)


def test_each_teacher_has_a_bridge_of_its_own() -> None:
    student = Student(model(SMALL), teacher_dims=[7, 16, 7])
    _, embeddings, _ = student.eval()(torch.rand(4, 3, 16, 16))
    assert [embedding_BD.shape[1] for embedding_BD in embeddings] == [7, 16, 7]
    assert not torch.equal(embeddings[0], embeddings[2])


def test_a_projector_leaves_the_networks_logits_as_they_are() -> None:
    network, images = model(SMALL), torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(Student(network, teacher_dims=[7])(images)[0], network(images)[0])


@pytest.mark.parametrize(
    ("section", "teacher_dim", "rows"), [(SMALL, None, 1), (NORMALISED, None, 2), (SMALL, 7, 2)], ids=str
)
def test_a_student_asks_for_as_many_rows_as_it_can_train_on(
    section: dict[str, Any], teacher_dim: int | None, rows: int
) -> None:
    student = Student(model(section), teacher_dims=[teacher_dim]).train()
    assert student.min_rows == rows
    student(torch.rand(rows, 3, 16, 16))


def test_batchnorm_on_one_value_is_what_the_rule_is_for() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm1d(3).train()(torch.rand(1, 3))
