"""sampled: exact classes to their rounding, and samples of the others whose mean over views is their probability."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from pipeline.cache.format.codec import RowIdentity, decode, encode, row_bytes
from pipeline.core.errors import CacheError
from pipeline.student.losses import LOSSES
from tests.errors import raises
from tests.pipeline.cache.format.codec.kinds import logits_output, round_trip, softmax, stored, teacher_like

STEP = math.log(1 + 32 / 3) / 4095
Row = tuple[list[int], list[int], int, list[int]]
"""Exact classes, their codes, the odds in 1/1024 nats, samples."""


def start_of(sample_id: str, view: int) -> float:
    """The first 8 bytes of a hash, plus the view with its 16 bits reversed as the first bits of 64; upper 32 bits."""
    canonical = b"".join(b"s" + len(part).to_bytes(8, "little") + part for part in (b"sampled", sample_id.encode()))
    key = int.from_bytes(hashlib.blake2b(canonical).digest()[:8], "little")
    return ((key + (int(f"{view:016b}"[::-1], 2) << 48)) % 2**64 >> 32) / 2**32


def sizes(num_classes: int, num_bytes: int) -> tuple[int, int, int]:
    """Bits of an id, lower bits of a sample, and upper ones beyond one for each sample."""
    low = max(0, math.floor(math.log2(max(1, 10 * num_classes // (8 * num_bytes)))))
    return math.ceil(math.log2(num_classes)), low, (num_classes - 1) >> low


def read(cell: bytes, num_classes: int) -> Row:
    """A stored row by docs/reference/format.md, a bit at a time."""
    num_exact, odds = cell[0], int.from_bytes(cell[1:3], "little", signed=True)
    bits = int.from_bytes(cell[3:], "little")
    id_bits, low_bits, high_bits = sizes(num_classes, len(cell) - 3)

    def number(first: int, width: int) -> int:
        return bits >> first & ((1 << width) - 1)

    entry = id_bits + 12
    exact = [number(at * entry, id_bits) for at in range(num_exact)]
    codes = [0, *(number(at * entry - 12, 12) for at in range(1, num_exact))]
    total, front = 8 * (len(cell) - 3), num_exact * entry - 12
    num_samples = (total - high_bits - front) // (low_bits + 1)
    high = [bit for bit in range(total - num_samples * low_bits - front) if number(front + bit, 1)]
    assert len(high) == num_samples
    return (
        exact,
        codes,
        odds,
        [(bit - rank) << low_bits | number(total - (rank + 1) * low_bits, low_bits) for rank, bit in enumerate(high)],
    )


def by_hand(values: NDArray[np.float32], num_bytes: int, temperature: float, start: float) -> Row:
    """The same from the logits, in a float64 loop."""
    num_classes = len(values)
    exponentials = [math.exp((float(value) - float(values.max())) / temperature) for value in values]
    p = [value / math.fsum(exponentials) for value in exponentials]
    order = sorted(range(num_classes), key=lambda number: -float(values[number]))
    id_bits, low_bits, high_bits = sizes(num_classes, num_bytes)

    def num_samples(num_exact: int) -> int:
        return (8 * num_bytes - high_bits - num_exact * (id_bits + 12) + 12) // (low_bits + 1)

    num_exact = 1
    while num_exact + 1 < num_classes and num_samples(num_exact + 1) >= 1:
        rest = math.fsum(p[number] for number in order[num_exact:])
        if p[order[num_exact]] * num_samples(num_exact) / rest * (low_bits + 1) <= id_bits + 12:
            break
        num_exact += 1
    exact = order[:num_exact]
    others = [number for number in range(num_classes) if number not in set(exact)]
    rest = math.fsum(p[number] for number in others)
    samples: list[int] = []
    sums, point = 0.0, start
    for number in others:
        sums += p[number] / rest * num_samples(num_exact)
        while point < sums - 1e-12:
            samples.append(number)
            point += 1
    below = [(float(values[order[0]]) - float(values[number])) / temperature for number in exact]
    codes = [max(min(round(math.log1p(d / 3) / STEP), 4095), int(d > 0)) for d in below]
    return exact, codes, round(1024 * math.log(rest / math.fsum(p[number] for number in exact))), samples


@pytest.mark.parametrize(
    ("kind", "num_classes"),
    [("sampled:2@1", 3), ("sampled:6@4", 40), ("sampled:20@1", 300), ("sampled:21@4", 1000)],
)
def test_a_row_is_that_of_a_loop_over_its_classes(kind: str, num_classes: int) -> None:
    output, values_NK = logits_output(kind, num_classes), teacher_like(5, num_classes, seed=1)
    # Flat, peaked, and with equal logits.
    values_NK[1] /= 10
    values_NK[2] *= 3
    values_NK[3] = np.round(values_NK[3])
    sample_ids = [f"shard/{number}" for number in range(5)]
    for view in (0, 1, 6):
        column = encode(values_NK, output, identity=RowIdentity(sample_ids, view))
        for values, cell, sample_id in zip(values_NK, column.to_pylist(), sample_ids, strict=True):
            start = start_of(sample_id, view)
            expected = by_hand(values, output.fields[2].count, output.temperatures[0], start)
            assert read(cell, num_classes) == expected


@pytest.mark.parametrize(("kind", "num_classes"), [("sampled:3@2", 10), ("sampled:20@1", 1000), ("sampled:9@4", 258)])
def test_a_row_has_n_entries_at_least_and_the_fewest_bytes_for_them(kind: str, num_classes: int) -> None:
    n, output = int(kind[8:].partition("@")[0]), logits_output(kind, num_classes)
    id_bits, _, _ = sizes(num_classes, 1)

    def fewest(num_bytes: int) -> int:
        _, low_bits, high_bits = sizes(num_classes, num_bytes)
        return n - 1 + (8 * num_bytes - high_bits - (n - 1) * (id_bits + 12) + 12) // (low_bits + 1)

    assert [fewest(output.fields[2].count - less) >= n for less in (0, 1)] == [True, False]
    for cell in stored(teacher_like(50, num_classes) * 2, kind):
        exact, _, _, samples = read(cell, num_classes)
        assert len(exact) + len(samples) >= n


def test_a_number_of_exact_classes_above_255_takes_two_bytes() -> None:
    output, values = logits_output("sampled:300@1", 1000), teacher_like(2, 1000)
    assert (output.fields[0].dtype, row_bytes(output)) == ("<u2", 2 + 2 + output.fields[2].count)
    values[:, :280] += 30
    first = int.from_bytes(stored(values, "sampled:300@1")[0][:2], "little")
    assert 256 <= first < 300
    decoded = round_trip(values, "sampled:300@1")
    largest = np.argsort(-values[0], kind="stable")[:first]
    (p,) = softmax(values[:1], 1.0)
    np.testing.assert_allclose(np.exp(decoded[0, largest]), p[largest], rtol=rounding(p[largest]))


def rounding(p_exact: NDArray[np.float64]) -> float:
    """The largest relative error of a stored probability: half a step of the odds, twice half a step of a code (once in
    the sum of all exact classes), at the largest distance, and the first code after 0; decoded in fp32."""
    farthest = math.log(p_exact.max() / p_exact.min())
    step = (min(farthest, 32) + 3) * math.expm1(STEP / 2) + 3 * math.expm1(STEP)
    return math.expm1(0.5 / 1024 + 2 * step) + 1e-5


@pytest.mark.parametrize(("kind", "num_classes"), [("sampled:3@2", 10), ("sampled:21@1", 1000), ("sampled:21@4", 300)])
def test_the_mean_over_all_starts_is_the_probability_and_exact_classes_have_it_in_each_row(
    kind: str, num_classes: int
) -> None:
    """1024 views divide the distance between two samples evenly."""
    output, temperature, num_views = logits_output(kind, num_classes), float(kind.partition("@")[2]), 1024
    for values in teacher_like(3, num_classes, seed=3) * np.array([[0.3], [1], [2]], np.float32):
        rows_VK = np.broadcast_to(values, (num_views, num_classes))
        column = encode(rows_VK, output, identity=RowIdentity(["shard/key"] * num_views, np.arange(num_views)))
        got_VK = softmax(decode(column, output, temperature=temperature), temperature)
        (p,) = softmax(values[None], temperature)
        exact, _, _, samples = read(column[0].as_py(), num_classes)
        assert exact[0] == values.argmax()
        relative = rounding(p[exact])
        np.testing.assert_allclose(got_VK[:, exact], np.broadcast_to(p[exact], (num_views, len(exact))), rtol=relative)
        # Of the starts of 1024 views, as many lie in an interval as its length demands, but for one.
        weight = (1 - p[exact].sum()) / len(samples)
        np.testing.assert_allclose(got_VK.mean(0), p, rtol=relative, atol=(1 + relative) * weight / num_views)


@given(st.integers(1, 70), st.integers(0, 10**6))
def test_the_views_of_a_row_are_evenly_spread_whatever_their_number(num_views: int, sample: int) -> None:
    """The discrepancy of van der Corput's sequence is at most (log2 V / 3 + 1) / V (Niederreiter 1992, ch. 3); an
    interval that wraps around is the complement of one that does not."""
    values = teacher_like(1, 300, seed=sample % 7)
    output = logits_output("sampled:8@4", 300)
    rows_VK = np.broadcast_to(values[0], (num_views, 300))
    column = encode(rows_VK, output, identity=RowIdentity([f"shard/{sample}"] * num_views, np.arange(num_views)))
    got_K = softmax(decode(column, output, temperature=4.0), 4.0).mean(0)
    (p,) = softmax(values, 4.0)
    exact, _, _, samples = read(column[0].as_py(), 300)
    weight = (1 - p[exact].sum()) / len(samples)
    bound = weight * (math.log2(num_views) / 3 + 1) / num_views
    relative = rounding(p[exact])
    assert (np.abs(got_K - p) <= (1 + relative) * bound + relative * p).all()


@given(
    arrays(np.float32, (2, 12), elements=st.floats(-(2.0**99), 2.0**99, width=32) | st.floats(-9, 9, width=32)),
    st.sampled_from([0.5, 1.0, 4.0]),
)
def test_any_finite_row_has_the_largest_class_and_probabilities_that_sum_to_one(
    values_NK: NDArray[np.float32], temperature: float
) -> None:
    kind = f"sampled:4@{temperature:g}"
    decoded_NK = round_trip(values_NK, kind, temperature=temperature)
    total_N = np.exp(decoded_NK / temperature).sum(1)
    np.testing.assert_allclose(total_N, 1, rtol=1e-5)
    p_NK = softmax(values_NK, temperature)
    for values, p, cell, decoded in zip(values_NK, p_NK, stored(values_NK, kind), decoded_NK, strict=True):
        exact, _, _, samples = read(cell, 12)
        assert exact[0] == values.argmax()
        assert not {*exact} & {*samples}
        assert {*np.flatnonzero(decoded > -900 * temperature)} == {*exact, *samples}
        assert samples == sorted(samples)
        # A sum up to any class differs by less than a sample, and by rounding.
        q = np.exp(decoded / temperature)
        weight = p[[number for number in range(12) if number not in exact]].sum() / len(samples)
        assert (np.abs(np.cumsum(q - p)) <= weight * 1.001 + rounding(np.maximum(p[exact], 1e-15))).all()


def test_one_class_with_all_probability_is_alone() -> None:
    values = np.full((2, 300), -1e30, np.float32)
    values[:, 7] = [0, 1e30]
    decoded_NK = round_trip(values, "sampled:5@1")
    assert (decoded_NK.argmax(1) == 7).all()
    np.testing.assert_allclose(np.exp(decoded_NK[:, 7]), 1, rtol=1e-6)
    assert (np.exp(np.delete(decoded_NK, 7, axis=1)).sum(1) < 2e-14).all()


def test_equal_logits_are_the_first_class_and_samples_at_equal_distances() -> None:
    values = np.zeros((1, 1000), np.float32)
    (cell,) = stored(values, "sampled:20@1")
    exact, _, odds, samples = read(cell, 1000)
    assert exact == [0]
    assert odds == round(1024 * math.log(999))
    assert {*np.diff(samples)} <= {999 // len(samples), -(-999 // len(samples))}


@pytest.mark.parametrize("num_classes", [65_537, 100_000])
def test_classes_beyond_two_bytes_are_sampled(num_classes: int) -> None:
    values = np.zeros((1, num_classes), np.float32)
    values[0, [num_classes - 1, 65_535]] = [14, 13]
    (cell,) = stored(values, "sampled:6@1")
    exact, _, _, samples = read(cell, num_classes)
    assert exact[0] == num_classes - 1
    assert {65_535} <= {*exact[1:], *samples}
    decoded = round_trip(values, "sampled:6@1")
    assert {*np.flatnonzero(decoded[0] > -900)} == {*exact, *samples}


def test_rows_are_a_function_of_sample_view_and_logits() -> None:
    values, output = teacher_like(4, 300), logits_output("sampled:5@4", 300)

    def rows(sample_ids: list[str], view: int | NDArray[np.int64], select: slice = slice(None)) -> list[bytes]:
        return encode(values[select], output, identity=RowIdentity(sample_ids, view)).to_pylist()

    sample_ids = ["a/0", "a/1", "b/0", "b/1"]
    first = rows(sample_ids, 3)
    assert rows(sample_ids, np.full(4, 3)) == first
    assert rows(sample_ids[2:], 3, slice(2, 4)) == first[2:]
    assert not {*rows(sample_ids, 4)} & {*first}
    assert rows([*reversed(sample_ids)], 3) != first


def test_kd_has_the_gradient_of_the_exact_probabilities_on_average() -> None:
    """Also where a row has no probability for most classes."""
    values, output, num_views = teacher_like(1, 258), logits_output("sampled:5@4", 258), 256
    rows_VK = np.broadcast_to(values[0], (num_views, 258))
    column = encode(rows_VK, output, identity=RowIdentity(["a/0"] * num_views, np.arange(num_views)))
    teacher_VK = torch.from_numpy(decode(column, output, temperature=4.0))
    student = torch.linspace(-2, 3, 258)

    def gradient(teacher_BK: torch.Tensor) -> tuple[float, NDArray[np.float64]]:
        student_BK = student.expand_as(teacher_BK).clone().requires_grad_()
        loss = LOSSES["kd"](student_BK, teacher_BK, temperature=4.0)
        loss.backward()
        assert student_BK.grad is not None
        return float(loss.detach()), student_BK.grad.double().sum(0).numpy()

    (value, got_K), (_, expected_K) = gradient(teacher_VK), gradient(torch.from_numpy(values))
    q = softmax(student[None].numpy(), 4.0)[0]
    # By hand, T² · Σ p (log p − log q) over the classes that a row has.
    p_VK = softmax(teacher_VK.numpy(), 4.0)
    logs_VK = np.log(p_VK, where=p_VK > 0, out=np.zeros_like(p_VK))
    assert value == pytest.approx(16 * (p_VK * (logs_VK - np.log(q))).sum(1).mean(), rel=1e-5)
    (exact,) = [read(column[0].as_py(), 258)[0]]
    relative = rounding(softmax(values, 4.0)[0, exact])
    p = softmax(values, 4.0)[0]
    weight = (1 - p[exact].sum()) / len(read(column[0].as_py(), 258)[3])
    bound_K = 4 * (relative * p + (1 + relative) * weight / num_views) + 1e-6
    assert (np.abs(got_K - expected_K) <= bound_K).all()


@pytest.mark.parametrize("change", [{0: 0}, {0: 200}, dict.fromkeys(range(3, 26), 0)])
def test_bits_that_are_no_row_are_refused(change: dict[int, int]) -> None:
    output = logits_output("sampled:9@4", 258)
    cells = stored(teacher_like(3, 258), "sampled:9@4")
    changed = bytearray(cells[1])
    for at, value in change.items():
        changed[at] = value
    with raises("cache.invalid-samples", CacheError):
        decode(pa.array([cells[0], bytes(changed)], pa.binary(len(changed))), output, temperature=4.0)


def test_another_temperature_is_refused() -> None:
    with raises("cache.other-temperature", CacheError, got="T = 1", expected="T = 4"):
        round_trip(teacher_like(2, 258), "sampled:5@4")
