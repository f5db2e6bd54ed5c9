from __future__ import annotations

import pytest

from pipeline import storage
from pipeline.cache.build.build_log import STALE_S, BuildLogWriter, find_running_build, read_last_log, remove_logs
from pipeline.cache.ops.inspect import inspect_cache
from tests.pipeline.caches import TinyCache, files


class Clock:
    """A clock that a test sets."""

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


def test_a_running_build_shows_its_planned_parts_and_remaining_time(tiny_cache: TinyCache, clock: Clock) -> None:
    log = writer(tiny_cache, clock)
    begun = inspect_cache(tiny_cache.url, now_s=1010)
    assert (begun.num_parts, begun.num_parts_planned, begun.eta_s, begun.log_age_s) == (6, 30, None, 10)
    clock.now_s = 1040
    log.update(6)
    # Four parts in 40 s; 24 of 30 are to come.
    report = inspect_cache(tiny_cache.url, now_s=1045)
    assert (report.eta_s, report.log_age_s) == (240, 5)
    assert report.builder is not None


def test_the_log_is_written_at_first_and_then_every_half_minute(tiny_cache: TinyCache, clock: Clock) -> None:
    log = writer(tiny_cache, clock)
    records: list[tuple[int, float]] = []
    for number in range(1, 8):
        clock.now_s += 10
        log.update(2 + number)
        record = read_last_log(tiny_cache.url)
        assert record is not None
        records.append((record.num_done, record.renewed_s))
    assert records == [(2, 1000), (2, 1000), (5, 1030), (5, 1030), (5, 1030), (8, 1060), (8, 1060)]


@pytest.mark.parametrize(("silence_s", "has_eta"), [(590, True), (610, False)])
def test_no_remaining_time_is_shown_for_a_driver_that_stopped_renewing_its_record(
    tiny_cache: TinyCache, clock: Clock, silence_s: float, has_eta: bool
) -> None:
    log = writer(tiny_cache, clock)
    clock.now_s = 1040
    log.update(6)
    report = inspect_cache(tiny_cache.url, now_s=1040 + silence_s)
    assert (report.eta_s is not None) is has_eta
    assert report.log_age_s == silence_s


def test_a_driver_of_long_parts_may_renew_its_record_less_often(tiny_cache: TinyCache, clock: Clock) -> None:
    log = writer(tiny_cache, clock)
    clock.now_s = 1000 + 4 * 3600
    log.update(6)
    assert inspect_cache(tiny_cache.url, now_s=clock.now_s + 9 * 3600).eta_s == 24 * 3600


def test_of_several_drivers_the_last_renewed_record_counts(tiny_cache: TinyCache, clock: Clock) -> None:
    writer(tiny_cache, clock, num_parts=10)
    clock.now_s = 2000
    writer(tiny_cache, clock, num_parts=20)
    assert inspect_cache(tiny_cache.url, now_s=2000).num_parts_planned == 20


def test_a_finished_build_removes_its_logs(tiny_cache: TinyCache, clock: Clock) -> None:
    before = files(tiny_cache.url)
    writer(tiny_cache, clock)
    writer(tiny_cache, clock)
    assert len(storage.listing(storage.join(tiny_cache.url, "log"))) == 2
    remove_logs(tiny_cache.url)
    assert files(tiny_cache.url) == before
    report = inspect_cache(tiny_cache.url)
    assert (report.num_parts_planned, report.builder, report.eta_s) == (None, None, None)


def test_a_build_without_a_part_yet_renews_its_record(
    tiny_cache: TinyCache, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.cache.build.build_log.RENEW_S", 0.01)
    with BuildLogWriter(tiny_cache.url, num_parts=9, num_before=0, clock=clock) as log:
        clock.now_s = 5000
        while (record := read_last_log(tiny_cache.url)) is None or record.renewed_s < clock.now_s:
            assert find_running_build(tiny_cache.url, now_s=1000) is not None
        assert find_running_build(tiny_cache.url, now_s=5000 + STALE_S) == record
        clock.now_s = 5001
        log.update(1)
        clock.now_s = 9000
    record = read_last_log(tiny_cache.url)
    assert record is not None
    assert (record.num_done, record.renewed_s) == (1, 5001)


@pytest.mark.parametrize(("num_done", "has_record"), [(0, False), (1, True)])
def test_a_build_that_fails_before_its_first_part_leaves_no_record(
    tiny_cache: TinyCache, clock: Clock, num_done: int, has_record: bool
) -> None:
    def interrupted() -> None:
        with BuildLogWriter(tiny_cache.url, num_parts=9, num_before=0, clock=clock) as log:
            log.update(num_done)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (read_last_log(tiny_cache.url) is not None) is has_record
