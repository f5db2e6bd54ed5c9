"""Random bits against published vectors and NumPy's Philox."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.augment.random_bits import key_of, permutation, permutations, philox4x64, to_uniform

WORD = st.integers(0, 2**64 - 1)
FULL = 2**64 - 1

# Random123's known-answer file: zeros, ones, and the digits of pi.
PUBLISHED = [
    (
        (0, 0),
        (0, 0, 0, 0),
        (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
    ),
    (
        (FULL, FULL),
        (FULL, FULL, FULL, FULL),
        (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
    ),
    (
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
        (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
    ),
]


def numpy_philox(key: tuple[int, ...], counter: tuple[int, ...]) -> list[int]:
    """NumPy's generator adds one to its 256-bit counter before each use."""
    before = (sum(word << (64 * index) for index, word in enumerate(counter)) - 1) % 2**256
    generator = np.random.Philox(key=key[0] | key[1] << 64, counter=before)
    return [int(word) for word in generator.random_raw(4)]


@pytest.mark.parametrize(("key", "counter", "words"), PUBLISHED)
def test_random_bits_equal_the_published_vectors(
    key: tuple[int, ...], counter: tuple[int, ...], words: tuple[int, ...]
) -> None:
    actual = philox4x64(np.array([key], dtype=np.uint64), np.array([counter], dtype=np.uint64))
    assert actual.tolist() == [list(words)]


@given(st.lists(st.tuples(st.tuples(WORD, WORD), st.tuples(WORD, WORD, WORD, WORD)), min_size=1, max_size=9))
def test_random_bits_equal_numpys(rows: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    keys = np.array([key for key, _ in rows], dtype=np.uint64)
    counters = np.array([counter for _, counter in rows], dtype=np.uint64)
    assert philox4x64(keys, counters).tolist() == [numpy_philox(*row) for row in rows]
    # One key serves every counter.
    assert philox4x64(keys[:1], counters).tolist() == [numpy_philox(rows[0][0], counter) for _, counter in rows]


@pytest.mark.parametrize(
    ("first", "second"), [(("ab", "c"), ("a", "bc")), ((1,), ("1",)), (("",), ()), (("\udcc3\udca9",), ("é",))]
)
def test_similar_arguments_have_different_keys(first: tuple[str | int, ...], second: tuple[str | int, ...]) -> None:
    assert key_of(*first).tolist() != key_of(*second).tolist()


def test_uniform_takes_the_upper_53_bits() -> None:
    words = np.array([0, 2**11 - 1, 2**11, 2**63, FULL], dtype=np.uint64)
    assert to_uniform(words).tolist() == [0.0, 0.0, 2.0**-53, 0.5, 1 - 2.0**-53]


@given(st.integers(0, 200), st.integers(0, 2**32))
def test_a_permutation_sorts_the_first_uint64s_of_its_key(size: int, seed: int) -> None:
    key = key_of("test", seed)
    words = [word for block in range(-(-size // 4)) for word in numpy_philox(tuple(key.tolist()), (block, 0, 0, 0))]
    assert permutation(key, size).tolist() == sorted(range(size), key=lambda index: words[index])


# Short ones share a batch of bits, and long ones exceed it.
@given(st.lists(st.integers(0, 99) | st.integers(16_000, 17_000), max_size=6))
@settings(max_examples=20)
def test_permutations_generated_together_equal_single_ones(sizes: list[int]) -> None:
    keys = [key_of("test", number) for number in range(len(sizes))]
    together = [*permutations(np.array(keys, np.uint64).reshape(-1, 2), sizes)]
    assert [order_N.tolist() for order_N in together] == [
        permutation(key, size).tolist() for key, size in zip(keys, sizes, strict=True)
    ]
