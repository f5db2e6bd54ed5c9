"""The JSON of ND's authors: it is written exactly, and any ambiguous file is refused with its reason."""

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


def test_an_official_file_is_read_in_any_order_of_its_classes() -> None:
    means = parse(OFFICIAL)
    assert means.class_C.tolist() == [0, 11]
    assert means.mean_CD.dtype == np.float32
    assert means.mean_CD.tolist() == np.array([[0.4884, -0.0943, 0], [0.2672, 0.21, 3]], np.float32).tolist()


def test_the_official_bytes_are_written() -> None:
    means = parse(OFFICIAL)
    assert format_nd_json([11, 0], means.mean_CD[[1, 0]]) == OFFICIAL


def test_four_decimals_are_rounded_and_not_truncated() -> None:
    text = format_nd_json([7], np.array([[0.00005001, -1.99996, 12.34564]], np.float32))
    assert json.loads(text) == {"7": [0.0001, -2.0, 12.3456]}


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
tables = st.dictionaries(st.integers(0, K - 1), st.lists(floats, min_size=D, max_size=D), min_size=1)


@given(tables)
def test_at_full_precision_every_bit_is_read_again(table: dict[int, list[float]]) -> None:
    mean_CD = np.array(list(table.values()), np.float32)
    means = parse(format_nd_json(list(table), mean_CD, decimals=None))
    assert dict(zip(means.class_C.tolist(), means.mean_CD.tolist(), strict=True)) == table


@given(tables)
def test_rounded_numbers_are_read_within_half_a_last_place(table: dict[int, list[float]]) -> None:
    text = format_nd_json(list(table), np.array(list(table.values()), np.float32))
    for name, row in json.loads(text).items():
        for written, exact in zip(row, table[int(name)], strict=True):
            assert abs(written - exact) <= 0.5e-4 * (1 + 1e-9) + abs(exact) * 2**-52
    assert parse(text).class_C.tolist() == sorted(table)


GOOD = "[1, 2.5, -3e-4]"
REFUSED = {
    "empty": (b"", "not-json", ""),
    "cut short": (OFFICIAL[:40], "not-json", ""),
    "not UTF-8": (b'{"0": [1, 2, 3], "\xff": 3}', "not-json", "utf-8"),
    "nested without end": (b"[" * 200_000, "not-json", ""),
    "a list": (f"[{GOOD}]".encode(), "not-json", "a list"),
    "no class": (b"{}", "empty", ""),
    "NaN": (b'{"0": [1, NaN, 3]}', "not-json", "NaN"),
    "infinity": (b'{"0": [1, -Infinity, 3]}', "not-json", "Infinity"),
    "an overflow": (b'{"3": [1, 1e999, 3]}', "overflow", "class 3"),
    "a large float": (b'{"3": [1, 1e39, 3]}', "overflow", "class 3"),
    "a large integer": (b'{"3": [1, 1' + b"0" * 400 + b", 3]}", "overflow", "class 3"),
    "an integer of many digits": (b'{"3": [1, 1' + b"0" * 9000 + b", 3]}", "not-json", ""),
    "ragged": (f'{{"0": {GOOD}, "4": [1, 2]}}'.encode(), "wrong-width", "class 4: 2 numbers"),
    "another width": (b'{"0": [1, 2, 3, 4]}', "wrong-width", "class 0: 4 numbers"),
    "text": (b'{"0": [1, "2", 3]}', "not-numbers", "class 0"),
    "true": (b'{"0": [1, true, 3]}', "not-numbers", "class 0"),
    "null": (b'{"0": [1, null, 3]}', "not-numbers", "class 0"),
    "nested": (b'{"0": [[1, 2, 3]]}', "not-numbers", "class 0"),
    "a mapping for a row": (b'{"0": {"1": 2}}', "not-numbers", "class 0"),
    "a name": (f'{{"cat": {GOOD}}}'.encode(), "unknown-class", "key 'cat'"),
    "a negative class": (f'{{"-1": {GOOD}}}'.encode(), "unknown-class", "key '-1'"),
    "a class too many": (f'{{"12": {GOOD}}}'.encode(), "unknown-class", "key '12'"),
    "a leading zero": (f'{{"07": {GOOD}}}'.encode(), "unknown-class", "key '07'"),
    "a space": (f'{{" 7": {GOOD}}}'.encode(), "unknown-class", "key ' 7'"),
    "a plus": (f'{{"+7": {GOOD}}}'.encode(), "unknown-class", "key '+7'"),
    "another script's digit": (f'{{"٧": {GOOD}}}'.encode(), "unknown-class", "key '٧'"),
    "an endless key": (f'{{"{"1" * 5000}": {GOOD}}}'.encode(), "unknown-class", f"key '{'1' * 40}'"),
    "a class twice": (f'{{"7": {GOOD}, "8": {GOOD}, "7": {GOOD}}}'.encode(), "not-json", "key '7'"),
}
EXPECTED = {"unknown-class": "class ids 0 to 11", "wrong-width": "3 numbers", "not-numbers": "3 numbers"}


@pytest.mark.parametrize("name", REFUSED)
def test_an_ambiguous_file_is_refused_with_its_reason(name: str) -> None:
    data, fault, got = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        parse(data)
    error = caught.value
    assert (error.code, error.where) == (f"config.class-means-{fault}", "here")
    assert got in str(error.got)
    assert error.expected == EXPECTED.get(fault, '{"<class id>": [D numbers], …}')
    assert error.next_step is not None
    assert len(str(error)) < 500


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(ConfigError):
        assert len(parse(data).class_C)


def test_the_largest_file_of_so_many_numbers_is_within_the_limit() -> None:
    longest = np.full((K, D), -1.1754943508222875e-38, np.float32)
    assert len(format_nd_json(range(K), longest, decimals=None)) < max_size_bytes(num_classes=K, embedding_dim=D)
