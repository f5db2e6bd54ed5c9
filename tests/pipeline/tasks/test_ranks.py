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


@pytest.mark.parametrize("num_classes", [1, 2, 9])
@pytest.mark.parametrize("num_rows", [0, 1, 200])
def test_ranks_are_those_of_a_stable_sort(num_rows: int, num_classes: int) -> None:
    """Of few values, so that most rows have ties."""
    random = np.random.default_rng(0)
    logits_NK = random.choice(np.array([-1.0, 0.0, -0.0, 0.5, 2.0], np.float32), (num_rows, num_classes))
    class_N = random.integers(0, num_classes, num_rows, np.int32)
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
