"""A term of several heads: its function for each of them, on its rows, with its share of the global batch."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.student.data.teacher_outputs import TeacherOutputs
from pipeline.student.losses import BatchShare, ClassDirections, CompositeLoss, LossInputs, TeacherInputs, ce, kd, nd
from pipeline.tasks import task_of
from schemas.config import Config, DataConfig
from tests.pipeline.heads import DATA, HEADS

TASK = task_of(DataConfig.model_validate(DATA))
EVEN_B, PAIR_B = torch.tensor([0, 1, -1, 1]), torch.tensor([-1, 9, 3, -1])


def compose(*sections: dict[str, Any]) -> CompositeLoss:
    return CompositeLoss(Config.model_validate({"loss": list(sections)}).loss, TASK, where="a test")


def batch() -> LossInputs:
    generator = torch.Generator().manual_seed(0)
    logits = {
        f"logits.{name}": torch.randn(2, 4, head["num_classes"], generator=generator) for name, head in HEADS.items()
    }
    embedding_2BD = torch.randn(2, 4, 3, generator=generator)
    means = {f"label_{name}": ClassDirections.of(torch.randn(10, 3, generator=generator)) for name in ("even", "pair")}
    return LossInputs(
        outputs={**{name: sides[0] for name, sides in logits.items()}, "embedding": embedding_2BD[0]},
        targets={"label_even": EVEN_B, "label_pair": PAIR_B, "label_tags": torch.zeros(4, 11, dtype=torch.int64)},
        teachers=(
            TeacherInputs(
                outputs=TeacherOutputs({(name, None): sides[1] for name, sides in logits.items()}, torch.rand(4)),
                projected={"nd": embedding_2BD[0]},
                class_directions=means,
            ),
        ),
    )


def test_a_term_is_the_sum_of_its_function_over_heads_each_over_the_rows_with_its_label() -> None:
    inputs = batch()
    # Another rank has as many rows, and no label of pair.
    share = BatchShare(
        world_size=2,
        num_rows=4,
        num_rows_global=8,
        num_labelled={"label_even": 3, "label_pair": 2},
        num_labelled_global={"label_even": 5, "label_pair": 2},
    )
    loss = compose({"name": "ce"}, {"name": "kd", "heads": ["pair", "even"], "weight": 2.0}, {"name": "nd"})
    assert loss.heads == {"ce": ("even", "pair"), "kd": ("pair", "even"), "nd": ("even", "pair")}
    assert loss.targets == ("label_even", "label_pair")
    assert {*loss.teacher_outputs} == {"logits.even", "logits.pair"}
    assert [head.name for head in loss.heads_of_class_means] == ["even", "pair"]
    total, values = loss(inputs, share, epoch=0)
    (teacher,) = inputs.teachers
    expected: dict[str, torch.Tensor] = {}
    for name in ("even", "pair"):
        student_BK, labels_B = inputs.outputs[f"logits.{name}"], inputs.targets[f"label_{name}"]
        teacher_BK, directions = teacher.outputs.at(f"logits.{name}"), teacher.class_directions[f"label_{name}"]
        expected |= {
            f"ce/{name}": ce(student_BK, labels_B),
            f"kd/{name}": kd(student_BK, teacher_BK, temperature=4.0),
            f"nd/{name}": nd(teacher.projected["nd"], teacher.outputs.norm_B, directions, labels_B),
        }
    expected |= {key: expected[f"{key}/even"] + expected[f"{key}/pair"] for key in ("ce", "kd", "nd")}
    torch.testing.assert_close(values, expected)
    # Means over the labelled rows of both ranks: 3 of 5 are here, and both of pair.
    of_labels = [expected[f"{key}/even"] * 2 * 3 / 5 + expected[f"{key}/pair"] * 2 for key in ("ce", "nd")]
    torch.testing.assert_close(total, sum(of_labels) + 2 * expected["kd"])


def test_a_term_of_one_head_has_no_further_values() -> None:
    loss, inputs = compose({"name": "kd", "heads": ["pair"]}), batch()
    share = BatchShare(world_size=1, num_rows=4, num_rows_global=4, num_labelled={}, num_labelled_global={})
    _, values = loss(inputs, share, epoch=0)
    assert [*values] == ["kd"]
    assert loss.student_outputs == {"logits.pair"}
