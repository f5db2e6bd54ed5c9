"""Threads change neither the order of results nor the position of an error, and end when no one reads the results."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.threads import map_ordered, prefetch


def numbers(stop: int, taken: list[int], *, fail_at: int | None = None) -> Iterator[int]:
    """0 … stop−1, each recorded in ``taken`` before it is handed out."""
    for number in range(stop):
        if number == fail_at:
            raise ZeroDivisionError(number)
        taken.append(number)
        yield number


def through_map(items: Iterator[int], ahead: int) -> Iterator[int]:
    return map_ordered(lambda item: item, items, threads=3, ahead=ahead, name="prefetch")


def through_prefetch(items: Iterator[int], ahead: int) -> Iterator[int]:
    return prefetch(items, depth=ahead)


Through = Callable[[Iterator[int], int], Iterator[int]]
BOTH = pytest.mark.parametrize("through", [through_map, through_prefetch])


def running_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def read_until_error(items: Iterator[int]) -> tuple[list[int], ZeroDivisionError]:
    seen: list[int] = []
    while True:
        try:
            seen.append(next(items))
        except ZeroDivisionError as error:
            return seen, error


@BOTH
@given(items=st.lists(st.integers(), max_size=30), ahead=st.integers(1, 4))
def test_the_same_items_come_in_the_same_order(through: Through, items: list[int], ahead: int) -> None:
    assert list(through(iter(items), ahead)) == items
    assert running_threads() == []


@BOTH
@given(fail_at=st.integers(0, 9), ahead=st.integers(1, 4))
def test_an_error_of_the_source_comes_at_its_position(through: Through, fail_at: int, ahead: int) -> None:
    """A map then drops the results in its window."""
    seen, error = read_until_error(through(numbers(10, [], fail_at=fail_at), ahead))
    assert error.args == (fail_at,)
    assert seen == list(range(fail_at if through is through_prefetch else max(fail_at - ahead, 0)))
    assert running_threads() == []


@given(st.integers(0, 19), st.integers(0, 5))
def test_an_error_of_a_mapped_item_comes_after_the_results_before_it(fail_at: int, ahead: int) -> None:
    def check(item: int) -> int:
        if item == fail_at:
            raise ZeroDivisionError(item)
        return item

    seen, error = read_until_error(map_ordered(check, range(20), threads=3, ahead=ahead, name="prefetch"))
    assert (seen, error.args) == (list(range(fail_at)), (fail_at,))
    assert running_threads() == []


@BOTH
@pytest.mark.parametrize("ahead", [1, 6])
def test_a_slow_reader_bounds_the_items_that_are_taken_ahead(through: Through, ahead: int) -> None:
    taken: list[int] = []
    for item in through(numbers(100, taken), ahead):
        assert len(taken) <= item + 1 + ahead
    assert len(taken) == 100


def test_a_map_that_is_closed_early_does_not_wait_for_its_threads() -> None:
    may_continue = threading.Event()

    def read(item: int) -> int:
        assert item == 0 or may_continue.wait(60)
        return item

    source = iter(range(1000))
    results = map_ordered(read, source, threads=16)
    try:
        assert next(results) == 0
        results.close()
        assert next(source) < 500
    finally:
        may_continue.set()


def test_a_prefetch_that_is_closed_early_ends_its_thread_and_closes_the_source() -> None:
    taken: list[int] = []
    closed = threading.Event()

    def source() -> Iterator[int]:
        try:
            yield from numbers(1_000_000, taken)
        finally:
            closed.set()

    items = prefetch(source(), depth=2)
    assert next(items) == 0
    items.close()
    assert closed.is_set()
    assert running_threads() == []
    # One handed out, two ahead.
    assert len(taken) <= 3


def test_an_error_in_closing_the_source_arrives_and_does_not_hang() -> None:
    def source() -> Iterator[int]:
        try:
            yield 1
            yield 2
        finally:
            raise ZeroDivisionError("in closing")

    items = prefetch(source())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(ZeroDivisionError, match="in closing"):
        next(items)


def test_a_prefetch_continues_while_its_reader_is_busy() -> None:
    second = threading.Event()

    def source() -> Iterator[int]:
        yield 1
        second.set()
        yield 2

    items = prefetch(source())
    assert next(items) == 1
    assert second.wait(timeout=30)
    assert list(items) == [2]
