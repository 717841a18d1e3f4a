"""Counters of a process: totals that never decrease, histograms, and counters of the hosted factory."""

import math

import pytest
from twisted.internet.task import Clock

from rtservice.process.counters import (
    DURATIONS,
    LAGS,
    CounterKey,
    Histogram,
    Lag,
    add,
    factory_counters,
    process_counters,
)


def test_histogram_bounds_are_inclusive_and_the_last_bucket_is_unbounded() -> None:
    histogram = Histogram((0.1, 1.0))
    for seconds in (0.0, 0.1, 0.100001, 1.0, 99.0):
        histogram.add(seconds)
    assert histogram.counts == [2, 2, 1]
    assert len(Histogram(DURATIONS).counts) == len(DURATIONS) + 1


def test_lag_is_the_delay_of_a_scheduled_call() -> None:
    clock, lag = Clock(), Lag()
    lag.start(clock)
    clock.advance(0.1)
    clock.advance(0.4)
    assert lag.histogram.counts[0] == 1
    assert lag.histogram.counts[LAGS.index(0.5)] == 1
    assert abs(lag.histogram.sum_us - 300_000) < 2
    lag.stop()
    assert clock.getDelayedCalls() == []


def test_gauges_are_not_totals() -> None:
    gauges = CounterKey("open"), CounterKey("phase", "open", "tcp:1"), CounterKey("memory")
    totals = CounterKey("opened", "", "tcp:1"), CounterKey("ended"), CounterKey("lag", "3")
    assert not any(key.is_total for key in gauges)
    assert all(key.is_total for key in totals)


def test_counters_are_added_by_name() -> None:
    totals = {"a": 1}
    add(totals, {"a": 2, "b": 3})
    assert totals == {"a": 3, "b": 3}


def test_process_counters_include_memory_cpu_time_and_descriptors() -> None:
    with open("/dev/null"):
        more = process_counters()
    less = process_counters()
    assert more[CounterKey("descriptors")] == less[CounterKey("descriptors")] + 1
    assert less[CounterKey("memory")] > 1 << 20
    assert less[CounterKey("cpu_us")] >= more[CounterKey("cpu_us")] > 0
    assert less[CounterKey("descriptor_limit")] >= less[CounterKey("descriptors")]


def test_factory_counter_named_total_is_a_total() -> None:
    found, problem = factory_counters({"said_total": 3, "rooms": 1.5, "full": True})
    total = CounterKey("protocol", "said_total")
    assert found == {total: 3, CounterKey("protocol", "rooms"): 1.5, CounterKey("protocol", "full"): 1}
    assert problem == ""
    assert [key for key in found if key.is_total] == [total]


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        (
            "a-b",
            1,
            "name 'a-b': not valid; accepted are a letter, then letters, digits and underscores, at most 100",
        ),
        ("", 1, "name '': not valid"),
        ("1st", 1, "name '1st': not valid"),
        ("_a", 1, "name '_a': not valid"),
        ("a\tb", 1, r"name 'a\tb': not valid"),
        ("a\n", 1, r"name 'a\n': not valid"),
        ("ä", 1, r"name '\xe4': not valid"),
        (5, 1, "name 5: not valid"),
        ("x" * 101, 1, ": not valid"),
        ("x", "1", "x '1': not a number from -1e+300 to 1e+300"),
        ("x", None, "x None: not a number from -1e+300 to 1e+300"),
        ("x", math.nan, "x nan: not a number from -1e+300 to 1e+300"),
        ("x", math.inf, "x inf: not a number from -1e+300 to 1e+300"),
        ("x", 10**400, "x 1000"),
        ("good", 1, "names 'good' and 'good_total': the same to Prometheus; rename one of them"),
    ],
)
def test_invalid_factory_counter_is_left_out_and_reported(name, value, problem) -> None:
    found, reported = factory_counters({name: value, "good_total": 7})
    assert found == {CounterKey("protocol", "good_total"): 7}
    assert problem in reported
    assert len(reported) < 250


def test_factory_has_at_most_100_counters() -> None:
    found, problem = factory_counters({f"a{number}": number for number in range(101)})
    assert len(found) == 100
    assert problem == "more than 100 values; the others are ignored"
