"""A thread that works ahead changes neither what comes nor when an error comes, and ends when it is not wanted."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.threads import prefetch


def counted(stop: int, made: list[int], *, fail_at: int | None = None) -> Iterator[int]:
    for number in range(stop):
        if number == fail_at:
            raise ZeroDivisionError(number)
        made.append(number)
        yield number


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@given(st.lists(st.integers(), max_size=30), st.integers(1, 4))
def test_the_same_items_in_the_same_order(items: list[int], depth: int) -> None:
    assert list(prefetch(iter(items), depth=depth)) == items
    assert prefetch_threads() == []


@given(st.integers(0, 9), st.integers(1, 4))
def test_an_error_comes_where_it_happened(fail_at: int, depth: int) -> None:
    seen: list[int] = []
    with pytest.raises(ZeroDivisionError, match=str(fail_at)):
        seen.extend(_collect(prefetch(counted(10, [], fail_at=fail_at), depth=depth), seen))
    assert seen == list(range(fail_at))
    assert prefetch_threads() == []


def _collect(items: Iterator[int], seen: list[int]) -> list[int]:
    for item in items:
        seen.append(item)
    return []


def test_closing_early_ends_the_thread_and_closes_the_source() -> None:
    made: list[int] = []
    closed = threading.Event()

    def source() -> Iterator[int]:
        try:
            yield from counted(1_000_000, made)
        finally:
            closed.set()

    items = source()
    ahead = prefetch(items, depth=2)
    assert next(ahead) == 0
    ahead.close()
    assert closed.is_set()
    assert prefetch_threads() == []
    # One handed over, two made ahead.
    assert len(made) <= 3


def test_a_slow_reader_bounds_what_is_made_ahead() -> None:
    made: list[int] = []
    ahead = prefetch(counted(100, made), depth=1)
    for item in ahead:
        assert len(made) <= item + 2
    assert len(made) == 100


def test_an_error_in_closing_the_source_arrives_and_does_not_hang() -> None:
    def source() -> Iterator[int]:
        try:
            yield 1
            yield 2
        finally:
            raise ZeroDivisionError("in closing")

    ahead = prefetch(source())
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ZeroDivisionError, match="in closing"):
        next(ahead)


def test_work_goes_on_while_the_reader_is_busy() -> None:
    second_made = threading.Event()

    def source() -> Iterator[int]:
        yield 1
        second_made.set()
        yield 2

    ahead = prefetch(source())
    assert next(ahead) == 1
    assert second_made.wait(timeout=30)
    assert list(ahead) == [2]
