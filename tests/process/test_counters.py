"""What a process counts: bounded words, totals that never fall, and what a listener's connections came to."""

import math

import pytest
from twisted.internet.task import Clock
from twisted.logger import Logger

from rtservice.process.counters import (
    DURATIONS,
    LAGS,
    PHASES,
    CounterNames,
    Histogram,
    Lag,
    ListenerStats,
    SlotNames,
    add,
    check_count,
    factory_counters,
    is_total,
    process_counters,
)
from rtservice.process.registry import Limits, Registry


def test_a_connection_that_ends_is_counted_by_why_by_duration_and_with_its_bytes() -> None:
    tally = ListenerStats()
    tally.opened = 3
    tally.ended("peer finished", "open", 0.05, 10, 32)
    tally.ended("peer finished", "open", 5.0, 1, 23)
    tally.ended("idle", "open", 700.0, 0, 22)
    assert tally.counters("tcp:1") == {
        "opened\t\ttcp:1": 3,
        "in\t\ttcp:1": 11,
        "out\t\ttcp:1": 77,
        "closed\tpeer finished\ttcp:1": 2,
        "closed\tidle\ttcp:1": 1,
        "duration\t1\ttcp:1": 1,
        "duration\t3\ttcp:1": 1,
        "duration\t6\ttcp:1": 1,
        "duration_us\t\ttcp:1": 705_050_000,
    }


def test_what_is_in_parentheses_is_the_kind_of_a_failed_handshake_and_no_reason() -> None:
    tally = ListenerStats()
    tally.ended("TLS failed (HTTP_REQUEST)", "tls", 0, 0, 0)
    tally.ended("TLS failed (BAD_RECORD_MAC)", "open", 0, 0, 0)
    tally.ended("PROXY header timed out", "proxy", 0, 0, 0)
    assert tally.closed == {"TLS failed": 2, "PROXY header timed out": 1}
    assert tally.handshake_failed == {"HTTP_REQUEST": 1, "PROXY header timed out": 1}


def test_there_are_only_so_many_words_whatever_peers_do() -> None:
    tally = ListenerStats()
    for number in range(1000):
        tally.ended(f"TLS failed (KIND_{number})", "tls", 0, 0, 0)
    assert len(tally.handshake_failed) == 51
    assert sum(tally.handshake_failed.values()) == 1000
    assert tally.handshake_failed["other"] == 950


def test_a_value_at_a_bound_is_in_its_bucket_and_one_above_all_in_the_last() -> None:
    histogram = Histogram((0.1, 1.0))
    for seconds in (0.0, 0.1, 0.100001, 1.0, 99.0):
        histogram.add(seconds)
    assert histogram.counts == [2, 2, 1]
    assert len(Histogram(DURATIONS).counts) == len(DURATIONS) + 1


def test_lag_is_how_late_a_call_is() -> None:
    clock, lag = Clock(), Lag()
    lag.start(clock)
    clock.advance(0.1)
    clock.advance(0.4)
    assert lag.histogram.counts[0] == 1
    assert lag.histogram.counts[LAGS.index(0.5)] == 1
    assert abs(lag.histogram.sum_us - 300_000) < 2
    lag.stop()
    assert clock.getDelayedCalls() == []


def test_gauges_are_no_totals() -> None:
    assert [is_total(name) for name in ("open", "phase\topen\ttcp:1", "opened\t\ttcp:1", "ended")] == [
        False,
        False,
        True,
        True,
    ]


def test_counters_are_added_by_name() -> None:
    totals = {"a": 1}
    add(totals, {"a": 2, "b": 3})
    assert totals == {"a": 3, "b": 3}


def test_a_process_knows_its_memory_time_and_descriptors() -> None:
    with open("/dev/null"):
        more = process_counters()
    less = process_counters()
    assert more["descriptors"] == less["descriptors"] + 1
    assert less["memory"] > 1 << 20
    assert less["cpu_us"] >= more["cpu_us"] > 0
    assert less["descriptor_limit"] >= less["descriptors"]


def test_what_a_factory_counts_is_a_total_if_its_name_says_so() -> None:
    found, problem = factory_counters({"said_total": 3, "rooms": 1.5, "full": True})
    assert found == {"protocol\tsaid_total\t": 3, "protocol\trooms\t": 1.5, "protocol\tfull\t": 1}
    assert problem == ""
    assert [name for name in found if is_total(name)] == ["protocol\tsaid_total\t"]


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("a-b", 1, "'a-b' is no name of letters, digits and underscores, 100 at the most"),
        ("", 1, "'' is no name"),
        ("1st", 1, "'1st' is no name"),
        ("_a", 1, "'_a' is no name"),
        ("a\tb", 1, r"'a\tb' is no name"),
        ("a\n", 1, r"'a\n' is no name"),
        ("ä", 1, r"'\xe4' is no name"),
        (5, 1, "5 is no name"),
        ("x" * 101, 1, "is no name"),
        ("x", "1", "'x' is '1', and not a number"),
        ("x", None, "'x' is None, and not a number"),
        ("x", math.nan, "'x' is nan, and not a number"),
        ("x", math.inf, "'x' is inf, and not a number"),
        ("x", 10**400, "'x' is 1000"),
        ("good", 1, "'good' and 'good_total' are one name to Prometheus"),
    ],
)
def test_what_cannot_be_shown_of_it_is_left_out_and_said(name, value, problem) -> None:
    found, said = factory_counters({name: value, "good_total": 7})
    assert found == {"protocol\tgood_total\t": 7}
    assert problem in said
    assert len(said) < 250


def test_a_factory_has_a_hundred_counters_at_the_most() -> None:
    found, problem = factory_counters({f"a{number}": number for number in range(101)})
    assert len(found) == 100
    assert problem == "there are more than 100"


# --- what a worker may report ---


def test_all_that_is_counted_may_be_reported() -> None:
    tally, lag = ListenerStats(), Lag()
    for seconds in (0, *DURATIONS):
        tally.ended("TLS failed (HTTP_REQUEST)", "tls", seconds + 0.001, 1, 2)
    tally.refuse("proxy-from")
    for seconds in (0, *LAGS):
        lag.histogram.add(seconds + 0.0001)
    connections = Registry(Logger(), Limits(max_connections=1))
    counters = {
        **tally.counters("tcp:1"),
        **lag.counters(),
        **process_counters(),
        **connections.counters(),
        **{f"phase\t{phase}\ttcp:1": 1 for phase in connections.phases()},
        **factory_counters({"said_total": 3, "rooms": 1.5, "full": True})[0],
        "drain_ended": 0,
        "drain_aborted": 0,
        "dropped": 0,
    }
    names = CounterNames(["tcp:1"])
    for name, count in counters.items():
        names.check(name)
        check_count(name, count)
    assert set(connections.phases()) == set(PHASES)


def test_a_listener_may_have_any_name() -> None:
    names = CounterNames(["unix:/a\tb"])
    names.check("opened\t\tunix:/a\tb")
    names.check("closed\tidle\tunix:/a\tb")
    with pytest.raises(ValueError, match="an unknown counter"):
        names.check("opened\t\tunix:/a")


def test_a_known_name_stays_known_when_there_are_no_more_new_ones() -> None:
    names = CounterNames(["tcp:1"])
    for number in range(51):
        names.check(f"closed\t{number}\ttcp:1")
    for _ in range(3):
        with pytest.raises(ValueError, match="more than 51 labels of 'closed'"):
            names.check("closed\tone more\ttcp:1")
    names.check("closed\t50\ttcp:1")
    names.check("refused\t50\ttcp:1")


def test_a_slot_shows_few_labels_over_all_its_workers_and_none_changes_its_name() -> None:
    names = SlotNames()
    totals: dict[str, float] = {}
    for generation in range(100):
        names.add(totals, {f"closed\t{generation}-{number}\ttcp:1": 1 for number in range(50)})
        names.add(totals, {f"protocol\tn{generation}_{number}_total\t": 1 for number in range(100)})
        names.add(totals, {"ended": 50, "opened\t\ttcp:1": 50})
    closed = {name: count for name, count in totals.items() if name.startswith("closed")}
    assert len(closed) == 101
    assert closed["closed\tother\ttcp:1"] == 4900
    assert sum(closed.values()) == totals["ended"] == totals["opened\t\ttcp:1"] == 5000
    assert len([name for name in totals if name.startswith("protocol")]) == 300
    assert names.shown("closed\t0-0\ttcp:1") == "closed\t0-0\ttcp:1"
    assert names.shown("closed\t99-0\ttcp:1") == "closed\tother\ttcp:1"
    assert names.shown("closed\t0\tunix:/s") == "closed\t0\tunix:/s"  # another listener has its own
