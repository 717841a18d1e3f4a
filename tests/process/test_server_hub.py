"""A Server and the hub of its factory: start, readiness, counters and stop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory
from zope.interface import implementer

from rtservice.interfaces import HubUnavailable, IHub, IHubUser, IStartable
from rtservice.process.counters import HUB_UP, CounterKey
from rtservice.process.state import State
from tests.support.carriers import HeldCarrier
from tests.support.fake_reactor import FakeReactor
from tests.support.receivers import Recorder
from tests.support.served import server


@implementer(IHubUser, IStartable)
class User(Factory):
    """Records the order of the calls; `waits` is the result of `start`."""

    noisy = False

    def __init__(self, waits: Deferred[None] | None = None) -> None:
        self.calls: list[str] = []
        self.waits = waits

    def startFactory(self) -> None:
        self.calls.append("startFactory")

    def use(self, hub: IHub) -> None:
        self.hub = hub
        self.calls.append("use")

    async def start(self) -> None:
        self.calls.append("start")
        if self.waits is not None:
            await self.waits

    def stopFactory(self) -> None:
        self.calls.append("stopFactory")


def hub_counters(service: Any) -> dict[str, float]:
    return {key.label: count for key, count in service.backend.counters().items() if key.name == "hub"}


def test_a_factory_gets_the_hub_once_before_its_start(timed) -> None:
    factory = User()
    service, _, _ = timed(factory=factory)
    assert factory.calls == ["startFactory", "use", "start"]
    assert factory.hub is service.backend.hub
    assert service.backend.hub.started
    service.stopService()
    assert factory.calls[3:] == ["stopFactory"]
    assert not service.backend.hub.started


def test_a_factory_that_does_not_use_the_hub_does_not_start_it(timed) -> None:
    service, _, _ = timed(carrier=HeldCarrier(), hub_required=True)
    assert not service.backend.hub.started
    assert service.standing == (True, "serving: 0 connections")
    assert hub_counters(service) == {}
    service.stopService()
    assert service.backend.hub._carrier.calls == []


@pytest.mark.parametrize("required", [True, False])
def test_readiness_depends_on_the_hub_if_it_is_required(timed, required) -> None:
    carrier = HeldCarrier()
    service, _, _ = timed(factory=User(), carrier=carrier, hub_required=required)
    assert service.standing == (not required, "serving: 0 connections, the hub has no connection")
    assert service.backend.status == "serving: 0 connections open, the hub has no connection"
    assert service.overview()["ready"] is not required
    carrier.up = True
    assert service.standing == (True, "serving: 0 connections")
    carrier.up = False
    assert service.is_ready is not required
    service.stopService()
    assert not service.is_ready


def test_a_reload_changes_whether_the_hub_is_required(timed) -> None:
    service, _, _ = timed(factory=User(), carrier=HeldCarrier())
    assert service.is_ready
    service.backend.apply(replace(service.backend.settings, hub_required=True))
    assert not service.is_ready


def test_the_start_does_not_wait_for_the_hub(timed) -> None:
    reports: list[str | None] = []
    service, _, _ = timed(factory=User(), carrier=HeldCarrier(), hub_required=True, report=reports.append)
    assert service.backend.state is State.SERVING
    assert reports == [None]


def test_the_counters_of_the_hub_stay_after_its_stop(timed) -> None:
    factory = User()
    service, _, _ = timed(factory=factory)
    factory.hub.subscribe("t", Recorder())
    factory.hub.join("t", b"ann")
    factory.hub.publish("t", b"1")
    counters = hub_counters(service)
    assert {name: counters[name] for name in ("up", "published", "topics", "subscriptions", "members")} == {
        **dict.fromkeys(("up", "published", "topics", "subscriptions", "members"), 1)
    }
    service.stopService()
    counters = hub_counters(service)
    assert {name: count for name, count in counters.items() if count} == {"published": 1}


def test_only_totals_of_the_hub_are_totals() -> None:
    assert CounterKey("hub", "published").is_total
    assert CounterKey("hub_heartbeat", "3").is_total
    assert not HUB_UP.is_total
    assert not CounterKey("hub", "topics").is_total


def test_a_stop_waits_until_the_hub_has_stopped(timed) -> None:
    carrier = HeldCarrier()
    stopped: Deferred[None] = Deferred()
    carrier.stop = lambda: stopped
    service, _, _ = timed(factory=User(), carrier=carrier)
    ended: list[Any] = []
    service.stopService().addCallback(ended.append)
    assert ended == []
    stopped.callback(None)
    assert ended == [None]


def test_a_stop_during_the_start_also_stops_the_hub(monkeypatch) -> None:
    monkeypatch.setattr("twisted.internet.reactor", FakeReactor())
    factory = User(waits=Deferred())
    service, _ = server(factory=factory)
    service.startService()
    assert service.backend.state is State.STARTING
    failed: list[Any] = []
    service.stopService()
    factory.hub.publish("t", b"").addErrback(failed.append)
    assert failed[0].check(HubUnavailable)
