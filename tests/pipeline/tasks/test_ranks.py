"""The rank of a class among tied logits, and hits counted by it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tasks.classification import class_ranks, predicted_classes


def sorted_ranks(logits_NK: np.ndarray, class_N: np.ndarray) -> list[int]:
    """By Python's stable sort: larger logits first, of equal ones the lower class."""
    ranks: list[int] = []
    for row_K, label in zip(logits_NK.tolist(), class_N.tolist(), strict=True):
        ranks.append(sorted(range(len(row_K)), key=lambda name, row_K=row_K: -row_K[name]).index(label))
    return ranks


@given(st.data(), st.integers(1, 9), st.integers(0, 12))
def test_ranks_are_those_of_a_stable_sort(data: st.DataObject, num_classes: int, num_rows: int) -> None:
    """Of few values, so that most rows have ties."""
    few = st.sampled_from([-1.0, 0.0, -0.0, 0.5, 2.0])
    rows = data.draw(
        st.lists(st.lists(few, min_size=num_classes, max_size=num_classes), min_size=num_rows, max_size=num_rows)
    )
    classes = data.draw(st.lists(st.integers(0, num_classes - 1), min_size=num_rows, max_size=num_rows))
    logits_NK = np.array(rows, np.float32).reshape(num_rows, num_classes)
    class_N = np.array(classes, np.int32)
    assert class_ranks(logits_NK, class_N).tolist() == sorted_ranks(logits_NK, class_N)


@given(st.lists(st.sampled_from([-1.0, 0.0, 3.0]), min_size=1, max_size=7))
def test_the_classes_of_a_row_have_each_rank_once_and_the_predicted_one_is_first(row: list[float]) -> None:
    logits_NK = np.tile(np.array(row, np.float32), (len(row), 1))
    rank_N = class_ranks(logits_NK, np.arange(len(row)))
    assert sorted(rank_N.tolist()) == [*range(len(row))]
    assert rank_N[predicted_classes(logits_NK[:1])[0]] == 0


@pytest.mark.parametrize("num_classes", [10, 1000])
def test_equal_logits_hit_for_class_0_alone(num_classes: int) -> None:
    logits_NK = np.zeros((num_classes, num_classes), np.float32)
    rank_N = class_ranks(logits_NK, np.arange(num_classes))
    assert ((rank_N < 1).sum(), (rank_N < 5).sum()) == (1, 5)
