"""Statistics of a listener, with a bounded number of labels."""

from rtservice.net.phases import OPEN, PROXY, TLS
from rtservice.process.counters import CounterKey
from rtservice.process.listener_stats import ListenerStats


def test_closed_connection_is_counted_by_reason_duration_and_bytes() -> None:
    stats = ListenerStats()
    stats.opened = 3
    stats.add_closed("peer finished", OPEN, 0.05, 10, 32)
    stats.add_closed("peer finished", OPEN, 5.0, 1, 23)
    stats.add_closed("idle", OPEN, 700.0, 0, 22)
    assert stats.counters("tcp:1") == {
        CounterKey("opened", "", "tcp:1"): 3,
        CounterKey("in", "", "tcp:1"): 11,
        CounterKey("out", "", "tcp:1"): 77,
        CounterKey("closed", "peer finished", "tcp:1"): 2,
        CounterKey("closed", "idle", "tcp:1"): 1,
        CounterKey("duration", "1", "tcp:1"): 1,
        CounterKey("duration", "3", "tcp:1"): 1,
        CounterKey("duration", "6", "tcp:1"): 1,
        CounterKey("duration_us", "", "tcp:1"): 705_050_000,
    }


def test_text_in_parentheses_is_the_kind_of_the_failed_handshake_not_the_reason() -> None:
    stats = ListenerStats()
    stats.add_closed("TLS failed (HTTP_REQUEST)", TLS, 0, 0, 0)
    stats.add_closed("TLS failed (BAD_RECORD_MAC)", OPEN, 0, 0, 0)
    stats.add_closed("PROXY header timed out", PROXY, 0, 0, 0)
    assert stats.closed == {"TLS failed": 2, "PROXY header timed out": 1}
    assert stats.handshake_failed == {"HTTP_REQUEST": 1, "PROXY header timed out": 1}


def test_number_of_handshake_failure_labels_is_bounded() -> None:
    stats = ListenerStats()
    for number in range(1000):
        stats.add_closed(f"TLS failed (KIND_{number})", TLS, 0, 0, 0)
    assert len(stats.handshake_failed) == 51
    assert sum(stats.handshake_failed.values()) == 1000
    assert stats.handshake_failed["other"] == 950
