"""Targets of the classification task: which bytes are a class index, and the columns of an index."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tasks import BadTargetError, task_of, task_settings
from tests.pipeline.shards.tars import data_config

MAX_INT32 = 2**31 - 1
TASK = task_of(data_config())
# None: no config reads a class index in these bytes.
CASES = [
    (b"0", 0),
    (b"7", 7),
    (b"007", 7),
    (b" 7\n", 7),
    (b"\t7\r\n", 7),
    (b"2147483647", MAX_INT32),
    (b"2147483648", None),
    (b"9" * 64, None),
    (b"", None),
    (b" ", None),
    (b"-1", None),
    (b"-0", None),
    (b"+3", None),
    (b"1_0", None),
    (b"3 4", None),
    (b"1.0", None),
    (b"1e1", None),
    (b"0x1", None),
    (b"x", None),
    (b"\xff", None),
    (b"7\0", None),
    ("٣".encode(), None),
    ("⁷".encode(), None),
]


@pytest.mark.parametrize(("text", "label"), CASES)
def test_only_ascii_digits_up_to_int32_are_a_class_index(text: bytes, label: int | None) -> None:
    texts = {"cls": text}
    assert TASK.try_parse(texts) == label
    assert TASK.is_target(text) == (label is not None)
    if label is None:
        with pytest.raises(BadTargetError):
            TASK.parse(texts)
    else:
        assert TASK.parse(texts) == label


def test_a_label_must_be_below_num_classes() -> None:
    task = task_of(data_config(num_classes=10))
    assert task.parse({"cls": b"9"}) == 9
    with pytest.raises(BadTargetError) as caught:
        task.parse({"cls": b"10"})
    assert (caught.value.member, caught.value.expected) == ("cls", "an integer in [0, 10) as text")
    assert task.try_parse({"cls": b"10"}) == 10, "another config may have more classes"


@given(st.integers(0, MAX_INT32))
def test_an_encoded_label_is_parsed_as_the_same_label(label: int) -> None:
    encoded = TASK.encode(label)
    assert TASK.parse(encoded) == TASK.try_parse(encoded) == label
    assert [(member, len(text) <= TASK.max_bytes) for member, text in encoded.items()] == [("cls", True)]


def test_the_member_is_that_of_the_config_in_lower_case() -> None:
    assert TASK.members == ("cls",)
    assert task_of(data_config(label="Full.CLS")).members == ("full.cls",)
    unlabelled = task_of(data_config(label=None))
    assert (unlabelled.members, unlabelled.parse({})) == ((), None)


def test_the_settings_of_an_index_name_no_task() -> None:
    """Format v1 has these keys alone, in this order."""
    settings = task_settings(data_config(label="CLS", num_classes=10))
    assert list(settings.items()) == [("label", "cls"), ("num_classes", 10)]
    assert task_of(settings) == task_of(data_config(label="CLS", num_classes=10))
    assert task_of({}).name == TASK.name == "classification"


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="alchemy"):
        task_of({"task": "alchemy"})


@pytest.mark.parametrize("labels", [[], [None], [3], [0, None, MAX_INT32, None]])
def test_the_column_holds_each_label_and_is_null_without_one(labels: list[int | None]) -> None:
    targets = TASK.rows(labels)
    (column,) = TASK.columns
    assert [*targets] == [column.name] == ["label"]
    assert targets["label"].dtype == np.int32
    assert TASK.has_target(targets).tolist() == [label is not None for label in labels]
    stored = column.to_arrow(targets["label"])
    assert stored.type == pa.int32()
    assert stored.to_pylist() == labels
    assert column.to_numpy(pa.chunked_array([stored])).tolist() == targets["label"].tolist()
