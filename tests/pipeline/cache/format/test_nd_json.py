"""The JSON of ND's authors: their form comes out, whatever is not plainly theirs is refused with its reason."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cache.format.nd_json import NdMeans, format_nd_json, max_size_bytes, parse_nd_json
from pipeline.core.errors import ConfigError

K, D = 12, 3
# As their script writes it: an indent of four, four decimals at most, classes as they were first seen.
OFFICIAL = b"""{
    "11": [
        0.2672,
        0.21,
        3.0
    ],
    "0": [
        0.4884,
        -0.0943,
        0.0
    ]
}"""


def parse(data: bytes) -> NdMeans:
    return parse_nd_json(data, num_classes=K, embedding_dim=D, where="here")


def test_an_official_file_is_read_whatever_the_order_of_its_classes() -> None:
    means = parse(OFFICIAL)
    assert means.class_C.tolist() == [0, 11]
    assert means.mean_CD.dtype == np.float32
    assert means.mean_CD.tolist() == np.array([[0.4884, -0.0943, 0], [0.2672, 0.21, 3]], np.float32).tolist()


def test_the_official_bytes_are_written() -> None:
    means = parse(OFFICIAL)
    assert format_nd_json([11, 0], means.mean_CD[[1, 0]]) == OFFICIAL


def test_four_decimals_are_rounded_not_cut() -> None:
    text = format_nd_json([7], np.array([[0.00005001, -1.99996, 12.34564]], np.float32))
    assert json.loads(text) == {"7": [0.0001, -2.0, 12.3456]}


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
tables = st.dictionaries(st.integers(0, K - 1), st.lists(floats, min_size=D, max_size=D), min_size=1)


@given(tables)
def test_in_full_every_bit_comes_back(table: dict[int, list[float]]) -> None:
    mean_CD = np.array(list(table.values()), np.float32)
    means = parse(format_nd_json(list(table), mean_CD, decimals=None))
    assert dict(zip(means.class_C.tolist(), means.mean_CD.tolist(), strict=True)) == table


@given(tables)
def test_rounded_every_number_comes_back_within_half_a_last_place(table: dict[int, list[float]]) -> None:
    text = format_nd_json(list(table), np.array(list(table.values()), np.float32))
    for name, row in json.loads(text).items():
        for written, exact in zip(row, table[int(name)], strict=True):
            assert abs(written - exact) <= 0.5e-4 * (1 + 1e-9) + abs(exact) * 2**-52
    assert parse(text).class_C.tolist() == sorted(table)


GOOD = "[1, 2.5, -3e-4]"
REFUSED = {
    "empty": (b"", "not JSON"),
    "cut short": (OFFICIAL[:40], "not JSON"),
    "not UTF-8": (b'{"0": [1, 2, 3], "\xff": 3}', "not JSON"),
    "nested without end": (b"[" * 200_000, "not JSON"),
    "a list": (f"[{GOOD}]".encode(), "got: +a list"),
    "no class": (b"{}", "hold no class"),
    "NaN": (b'{"0": [1, NaN, 3]}', "NaN is no number"),
    "infinity": (b'{"0": [1, -Infinity, 3]}', "Infinity is no number"),
    "an overflow": (b'{"3": [1, 1e999, 3]}', "beyond float32[\\s\\S]*class 3"),
    "a large float": (b'{"3": [1, 1e39, 3]}', "beyond float32[\\s\\S]*class 3"),
    "a large integer": (b'{"3": [1, 1' + b"0" * 400 + b", 3]}", "beyond float32[\\s\\S]*class 3"),
    "an integer of many digits": (b'{"3": [1, 1' + b"0" * 9000 + b", 3]}", "not JSON"),
    "ragged": (f'{{"0": {GOOD}, "4": [1, 2]}}'.encode(), "class 4: 2 numbers[\\s\\S]*expected: +3 numbers"),
    "another width": (b'{"0": [1, 2, 3, 4]}', "not as wide[\\s\\S]*class 0: 4 numbers"),
    "text": (b'{"0": [1, "2", 3]}', "not a list of numbers[\\s\\S]*class 0"),
    "true": (b'{"0": [1, true, 3]}', "not a list of numbers"),
    "null": (b'{"0": [1, null, 3]}', "not a list of numbers"),
    "nested": (b'{"0": [[1, 2, 3]]}', "not a list of numbers"),
    "a mapping for a row": (b'{"0": {"1": 2}}', "not a list of numbers"),
    "a name": (f'{{"cat": {GOOD}}}'.encode(), "key 'cat'"),
    "a negative class": (f'{{"-1": {GOOD}}}'.encode(), "key '-1'[\\s\\S]*class ids 0 to 11"),
    "a class too many": (f'{{"12": {GOOD}}}'.encode(), "key '12'[\\s\\S]*class ids 0 to 11"),
    "a leading zero": (f'{{"07": {GOOD}}}'.encode(), "key '07'"),
    "a space": (f'{{" 7": {GOOD}}}'.encode(), "key ' 7'"),
    "a plus": (f'{{"+7": {GOOD}}}'.encode(), "key '\\+7'"),
    "another script's digit": (f'{{"٧": {GOOD}}}'.encode(), "key '٧'"),
    "an endless key": (f'{{"{"1" * 5000}": {GOOD}}}'.encode(), "key '1{40}'"),
    "a class twice": (f'{{"7": {GOOD}, "8": {GOOD}, "7": {GOOD}}}'.encode(), "key '7' stands there twice"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_could_mean_something_else_is_refused_with_its_reason(name: str) -> None:
    data, told = REFUSED[name]
    with pytest.raises(ConfigError, match=told) as caught:
        parse(data)
    assert caught.value.where == "here"
    assert caught.value.next_step is not None
    assert len(str(caught.value)) < 500


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(ConfigError):
        assert len(parse(data).class_C)


def test_the_largest_file_of_so_many_numbers_is_within_the_limit() -> None:
    longest = np.full((K, D), -1.1754943508222875e-38, np.float32)
    assert len(format_nd_json(range(K), longest, decimals=None)) < max_size_bytes(num_classes=K, embedding_dim=D)
