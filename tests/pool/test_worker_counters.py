"""Counters reported by a worker: encoding, checks, and the bounded number of labels in a slot."""

import pytest
from twisted.logger import Logger

from rtservice.net.phases import TLS
from rtservice.pool.worker_counters import CounterDecoder, SlotCounters, encode_counters
from rtservice.process.admission import Limits
from rtservice.process.counters import (
    DROPPED,
    DURATIONS,
    ENDED,
    LAGS,
    PHASES,
    CounterKey,
    Lag,
    factory_counters,
    process_counters,
)
from rtservice.process.listener_stats import ListenerStats
from rtservice.process.registry import Registry

TCP = "tcp:1"


def test_every_counter_is_accepted_and_decoded_unchanged() -> None:
    stats, lag = ListenerStats(), Lag()
    for seconds in (0, *DURATIONS):
        stats.add_closed("TLS failed (HTTP_REQUEST)", TLS, seconds + 0.001, 1, 2)
    stats.add_refused("proxy-from")
    for seconds in (0, *LAGS):
        lag.histogram.add(seconds + 0.0001)
    registry = Registry(Logger(), Limits(max_connections=1))
    counters = {
        **stats.counters(TCP),
        **lag.counters(),
        **process_counters(),
        **registry.counters(),
        **{CounterKey("phase", phase, TCP): 1 for phase in registry.phases()},
        **factory_counters({"said_total": 3, "rooms": 1.5, "full": True})[0],
        CounterKey("drain_ended"): 0,
        CounterKey("drain_aborted"): 0,
        DROPPED: 0,
    }
    assert CounterDecoder([TCP]).decode(encode_counters(counters)) == counters
    assert set(registry.phases()) == set(PHASES)


def test_listener_name_may_contain_a_tab() -> None:
    name = "unix:/a\tb"
    decoder = CounterDecoder([name])
    counters: dict[CounterKey, float] = {CounterKey("opened", "", name): 1, CounterKey("closed", "idle", name): 2}
    assert decoder.decode(encode_counters(counters)) == counters
    with pytest.raises(ValueError, match="an unknown counter"):
        decoder.decode({"opened\t\tunix:/a": 1})


def test_existing_labels_are_accepted_after_the_label_limit_is_reached() -> None:
    decoder = CounterDecoder([TCP])
    for number in range(51):
        decoder.decode({f"closed\t{number}\t{TCP}": 1})
    for _ in range(3):
        with pytest.raises(ValueError, match="more than 51 labels of 'closed'"):
            decoder.decode({f"closed\tone more\t{TCP}": 1})
    decoder.decode({f"closed\t50\t{TCP}": 1})
    decoder.decode({f"refused\t50\t{TCP}": 1})


def test_labels_of_a_slot_are_bounded_over_all_its_workers_and_stable() -> None:
    slot = SlotCounters()
    totals: dict[CounterKey, float] = {}
    for generation in range(100):
        slot.add(totals, {CounterKey("closed", f"{generation}-{number}", TCP): 1 for number in range(50)})
        slot.add(totals, {CounterKey("protocol", f"n{generation}_{number}_total"): 1 for number in range(100)})
        slot.add(totals, {ENDED: 50, CounterKey("opened", "", TCP): 50})
    closed = {key: count for key, count in totals.items() if key.name == "closed"}
    assert len(closed) == 101
    assert closed[CounterKey("closed", "other", TCP)] == 4900
    assert sum(closed.values()) == totals[ENDED] == totals[CounterKey("opened", "", TCP)] == 5000
    assert len([key for key in totals if key.name == "protocol"]) == 300
    assert slot.shown(CounterKey("closed", "0-0", TCP)) == CounterKey("closed", "0-0", TCP)
    assert slot.shown(CounterKey("closed", "99-0", TCP)) == CounterKey("closed", "other", TCP)
    other_listener = CounterKey("closed", "0", "unix:/s")  # has separate labels
    assert slot.shown(other_listener) == other_listener
