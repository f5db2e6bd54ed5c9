from __future__ import annotations

import pytest

from pipeline import storage
from pipeline.cache.build.build_log import SILENT_S, BuildLogWriter, find_running_build, read_last_log, remove_logs
from pipeline.cache.ops.inspect import inspect_cache
from tests.pipeline.caches import TinyCache, files


class Clock:
    """Stands still until it is set."""

    def __init__(self, now_s: float) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock(1000.0)


def writer(cache: TinyCache, clock: Clock, *, num_parts: int = 30, num_before: int = 2) -> BuildLogWriter:
    log = BuildLogWriter(cache.url, num_parts=num_parts, num_before=num_before, clock=clock)
    log.update(num_before)
    return log


def test_a_build_under_way_says_what_is_planned_and_how_long_it_takes(tiny_cache: TinyCache, clock: Clock) -> None:
    log = writer(tiny_cache, clock)
    begun = inspect_cache(tiny_cache.url, now_s=1010)
    assert (begun.num_parts, begun.num_parts_planned, begun.eta_s, begun.last_heard_s) == (6, 30, None, 10)
    clock.now_s = 1040
    log.update(6)
    # Four parts in 40 s; 24 of 30 are to come.
    report = inspect_cache(tiny_cache.url, now_s=1045)
    assert (report.eta_s, report.last_heard_s) == (240, 5)
    assert report.builder is not None


def test_the_log_is_written_at_first_and_then_every_half_minute(tiny_cache: TinyCache, clock: Clock) -> None:
    log = writer(tiny_cache, clock)
    seen: list[tuple[int, float]] = []
    for number in range(1, 8):
        clock.now_s += 10
        log.update(2 + number)
        found = read_last_log(tiny_cache.url)
        assert found is not None
        seen.append((found.num_done, found.renewed_s))
    assert seen == [(2, 1000), (2, 1000), (5, 1030), (5, 1030), (5, 1030), (8, 1060), (8, 1060)]


@pytest.mark.parametrize(("silence_s", "known"), [(590, True), (610, False)])
def test_of_a_driver_that_was_silent_for_long_no_time_is_told(
    tiny_cache: TinyCache, clock: Clock, silence_s: float, known: bool
) -> None:
    log = writer(tiny_cache, clock)
    clock.now_s = 1040
    log.update(6)
    report = inspect_cache(tiny_cache.url, now_s=1040 + silence_s)
    assert (report.eta_s is not None) is known
    assert report.last_heard_s == silence_s


def test_a_driver_whose_parts_take_long_may_be_silent_for_longer(tiny_cache: TinyCache, clock: Clock) -> None:
    log = writer(tiny_cache, clock)
    clock.now_s = 1000 + 4 * 3600
    log.update(6)
    assert inspect_cache(tiny_cache.url, now_s=clock.now_s + 9 * 3600).eta_s == 24 * 3600


def test_of_several_drivers_the_last_one_heard_of_counts(tiny_cache: TinyCache, clock: Clock) -> None:
    writer(tiny_cache, clock, num_parts=10)
    clock.now_s = 2000
    writer(tiny_cache, clock, num_parts=20)
    assert inspect_cache(tiny_cache.url, now_s=2000).num_parts_planned == 20


def test_logs_are_no_part_of_a_cache_and_a_finished_build_removes_them(tiny_cache: TinyCache, clock: Clock) -> None:
    whole = files(tiny_cache.url)
    writer(tiny_cache, clock)
    writer(tiny_cache, clock)
    assert len(storage.listing(storage.join(tiny_cache.url, "log"))) == 2
    remove_logs(tiny_cache.url)
    assert files(tiny_cache.url) == whole
    report = inspect_cache(tiny_cache.url)
    assert (report.num_parts_planned, report.builder, report.eta_s) == (None, None, None)


def test_a_build_without_a_part_yet_renews_its_record(
    tiny_cache: TinyCache, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.cache.build.build_log._RENEW_S", 0.01)
    with BuildLogWriter(tiny_cache.url, num_parts=9, num_before=0, clock=clock) as log:
        clock.now_s = 5000
        while (found := read_last_log(tiny_cache.url)) is None or found.renewed_s < clock.now_s:
            assert find_running_build(tiny_cache.url, now_s=1000) is not None
        assert find_running_build(tiny_cache.url, now_s=5000 + SILENT_S) == found
        clock.now_s = 5001
        log.update(1)
        clock.now_s = 9000
    found = read_last_log(tiny_cache.url)
    assert found is not None
    assert (found.num_done, found.renewed_s) == (1, 5001)


@pytest.mark.parametrize(("num_done", "stays"), [(0, False), (1, True)])
def test_a_build_that_fails_before_its_first_part_leaves_no_record(
    tiny_cache: TinyCache, clock: Clock, num_done: int, stays: bool
) -> None:
    def interrupted() -> None:
        with BuildLogWriter(tiny_cache.url, num_parts=9, num_before=0, clock=clock) as log:
            log.update(num_done)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (read_last_log(tiny_cache.url) is not None) is stays
