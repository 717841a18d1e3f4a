"""The hub of a process: arguments, subscriptions, presence, claims, and what it asks of its carrier."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.logger import Logger, globalLogPublisher
from zope.interface.verify import verifyObject

from rtservice.histogram import Histogram
from rtservice.hub.carrier import HEARTBEATS, MOST_MEMBERS, Carrier, heartbeat_counters
from rtservice.hub.choice import make_carrier
from rtservice.hub.fanout import TOPIC_LIMIT
from rtservice.hub.hub import LONGEST_MEMBER, LONGEST_MESSAGE, LONGEST_TOPIC, Hub
from rtservice.hub.local import LocalCarrier
from rtservice.interfaces import (
    HubFull,
    HubUnavailable,
    IClaim,
    IHub,
    IMembership,
    IReceiver,
    ISubscription,
    Members,
)
from rtservice.process.counters import HUB_GAUGES, HUB_TOTALS, CounterKey, hub_counters
from tests.support.carriers import HeldCarrier
from tests.support.receivers import GAP, Recorder


class World:
    """A started hub with a carrier."""

    def __init__(self, carrier: Carrier | None = None) -> None:
        self.reactor = Clock()
        self.events: list[dict[str, Any]] = []
        self.carrier: Any = LocalCarrier() if carrier is None else carrier
        self.hub = Hub(self.carrier, Logger(observer=self.events.append))
        self.hub.start(self.reactor)

    def run(self) -> None:
        self.reactor.advance(0)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def held() -> World:
    """A hub whose carrier waits for the test."""
    return World(HeldCarrier())


def result(deferred: Deferred[Any]) -> Any:
    """Return the result of a Deferred that has fired."""
    found: list[Any] = []
    deferred.addCallback(found.append)
    assert len(found) == 1
    return found[0]


def error(deferred: Deferred[Any]) -> BaseException:
    """Return the exception of a Deferred that has failed."""
    found: list[Any] = []
    deferred.addErrback(found.append)
    assert len(found) == 1
    return found[0].value


def outcomes(deferred: Deferred[Any]) -> list[Any]:
    """Return a list that gets the result, or the exception, of a Deferred."""
    found: list[Any] = []
    deferred.addCallbacks(found.append, lambda failure: found.append(failure.value))
    return found


# --- arguments ---

INVALID_TEXTS = {
    "empty": ("", ValueError, "of 0 bytes; it must have 1 to 200 bytes in UTF-8"),
    "long": ("x" * (LONGEST_TOPIC + 1), ValueError, "of 201 bytes; it must have 1 to 200 bytes in UTF-8"),
    "long in UTF-8": ("ä" * (LONGEST_TOPIC // 2 + 1), ValueError, "of 202 bytes; it must have"),
    "a surrogate": ("x\udc80", ValueError, "'x\\udc80': not valid Unicode"),
    "bytes": (b"x", TypeError, "of type bytes; it must be str"),
    "None": (None, TypeError, "of type NoneType; it must be str"),
}


@pytest.mark.parametrize(("text", "kind", "problem"), INVALID_TEXTS.values(), ids=INVALID_TEXTS)
@pytest.mark.parametrize("method", ["publish", "subscribe", "join", "members", "claim"])
def test_an_invalid_topic_or_key_is_rejected(world, method, text, kind, problem) -> None:
    more = {"publish": [b""], "subscribe": [Recorder()], "join": [b""], "members": [], "claim": [b""]}[method]
    with pytest.raises(kind) as caught:
        getattr(world.hub, method)(text, *more)
    assert str(caught.value).startswith(("key " if method == "claim" else "topic ") + problem)


@pytest.mark.parametrize(
    ("method", "what", "longest"),
    [
        ("publish", "message", LONGEST_MESSAGE),
        ("join", "member", LONGEST_MEMBER),
        ("claim", "holder", LONGEST_MEMBER),
    ],
)
def test_a_message_member_or_holder_is_bytes_of_limited_length(world, method, what, longest) -> None:
    call = getattr(world.hub, method)
    for value in ("text", bytearray(b"x"), None):
        with pytest.raises(TypeError) as wrong:
            call("t", value)
        assert str(wrong.value) == f"{what} of type {type(value).__name__}; it must be bytes"
    with pytest.raises(ValueError, match=f"{what} of {longest + 1} bytes; it must have at most {longest}"):
        call("t", bytes(longest + 1))
    result(call("t", bytes(longest)))
    result(call("t" * LONGEST_TOPIC, b""))


def test_a_receiver_needs_both_methods(world) -> None:
    class Half:
        def received(self, topic: str, message: bytes) -> None:
            pass

    class Whole(Half):
        def gap(self, topic: str) -> None:
            pass

    with pytest.raises(TypeError, match="receiver of type Half; it must provide IReceiver"):
        world.hub.subscribe("t", Half())
    result(world.hub.subscribe("t", Whole()))


def test_the_objects_of_the_hub_provide_their_interfaces(world) -> None:
    assert verifyObject(IHub, world.hub)
    assert verifyObject(IReceiver, Recorder())
    assert verifyObject(ISubscription, result(world.hub.subscribe("t", Recorder())))
    assert verifyObject(IMembership, result(world.hub.join("t", b"")))
    assert verifyObject(IClaim, result(world.hub.claim("k", b"")))


# --- publish and subscribe ---


def test_a_message_reaches_each_subscription_of_its_topic_once_and_later(world) -> None:
    one, two, other = Recorder(), Recorder(), Recorder()
    for topic, receiver in (("t", one), ("t", two), ("t", two), ("other", other)):
        result(world.hub.subscribe(topic, receiver))
    result(world.hub.publish("t", b"1"))
    result(world.hub.publish("nobody", b"2"))
    assert one.got == []
    world.run()
    assert (one.got, two.got, other.got) == ([b"1"], [b"1", b"1"], [])


def test_a_cancelled_subscription_gets_nothing_more(world) -> None:
    receiver = Recorder()
    subscription = result(world.hub.subscribe("t", receiver))
    world.hub.publish("t", b"1")
    subscription.cancel()
    subscription.cancel()
    world.hub.publish("t", b"2")
    world.run()
    assert receiver.got == []
    assert world.hub.counters()["topics"] == world.hub.counters()["subscriptions"] == 0


def test_a_receiver_may_use_the_hub_while_it_is_called(world) -> None:
    inner = Recorder()

    def react(item: Any) -> None:
        if item == b"1":
            subscriptions.append(result(world.hub.subscribe("t", inner)))
            world.hub.publish("t", b"2")
            subscriptions[0].cancel()

    outer = Recorder(react)
    subscriptions = [result(world.hub.subscribe("t", outer))]
    world.hub.publish("t", b"1")
    world.run()
    assert (outer.got, inner.got) == ([b"1"], [b"2"])


def test_publishing_fails_while_too_many_messages_wait(world) -> None:
    receiver = Recorder()
    world.hub.subscribe("t", receiver)
    size = LONGEST_MESSAGE
    for _ in range(TOPIC_LIMIT // size - 1):
        result(world.hub.publish("t", bytes(size)))
    problem = error(world.hub.publish("t", bytes(size)))
    assert isinstance(problem, HubFull)
    assert str(problem) == "too many messages of the topic t wait for receivers"
    result(world.hub.publish("other", bytes(size)))
    world.run()
    result(world.hub.publish("t", b"1"))
    world.run()
    assert receiver.got == [bytes(size)] * 3 + [b"1"]  # nothing that was accepted is missing
    counters = world.hub.counters()
    assert (counters["published"], counters["publish_failed"], counters["dropped"]) == (5, 1, 0)


def test_a_message_that_the_carrier_cannot_deliver_is_dropped_with_a_gap(world) -> None:
    receiver = Recorder()
    world.hub.subscribe("t", receiver)
    for number in range(TOPIC_LIMIT // LONGEST_MESSAGE + 2):
        world.hub.deliver("t", b"%d" % number * LONGEST_MESSAGE)
    world.run()
    world.hub.deliver("t", b"9")
    world.run()
    assert [item if item == GAP else item[:1] for item in receiver.got] == [b"0", b"1", b"2", GAP, b"9"]
    assert (world.hub.counters()["dropped"], world.hub.counters()["gaps"]) == (3, 1)


def test_a_topic_is_subscribed_once_and_unsubscribed_with_its_last_receiver(held) -> None:
    first, second = (outcomes(held.hub.subscribe("t", Recorder())) for _ in range(2))
    assert held.carrier.calls == [("subscribe", "t")]
    assert (first, second) == ([], [])
    held.carrier.waiting.popleft().callback(None)
    third = outcomes(held.hub.subscribe("t", Recorder()))
    assert held.hub.topics() == ["t"]
    for found in (first, second, third):
        assert held.carrier.calls == [("subscribe", "t")]
        found[0].cancel()
    assert held.carrier.calls == [("subscribe", "t"), ("unsubscribe", "t")]
    assert held.hub.topics() == []


def test_a_subscription_that_is_cancelled_before_it_is_active_is_not_called(held) -> None:
    receiver = Recorder()
    waiting = held.hub.subscribe("t", receiver)
    outcome = outcomes(waiting)
    waiting.cancel()
    assert isinstance(outcome[0], CancelledError)
    assert held.carrier.calls == [("subscribe", "t"), ("unsubscribe", "t")]
    # A second subscription of the same topic waits for its own answer.
    again = outcomes(held.hub.subscribe("t", Recorder()))
    held.carrier.waiting.popleft().callback(None)
    assert again == []
    held.carrier.waiting.popleft().callback(None)
    assert len(again) == 1
    held.hub.deliver("t", b"1")
    held.run()
    assert receiver.got == []


def test_cancelling_one_of_two_waiting_subscriptions_keeps_the_other_one(held) -> None:
    first, second = (held.hub.subscribe("t", Recorder()) for _ in range(2))
    outcome = outcomes(first)
    first.cancel()
    assert isinstance(outcome[0], CancelledError)
    held.carrier.waiting.popleft().callback(None)
    result(second)
    assert held.carrier.calls == [("subscribe", "t")]


def test_a_subscription_that_the_carrier_rejects_fails_for_each_that_waits(held) -> None:
    receivers = [Recorder(), Recorder()]
    waiting = [held.hub.subscribe("t", receiver) for receiver in receivers]
    held.carrier.waiting.popleft().errback(HubUnavailable("no permission"))
    assert [str(error(each)) for each in waiting] == ["no permission"] * 2
    held.hub.deliver("t", b"1")
    held.run()
    assert [receiver.got for receiver in receivers] == [[], []]
    assert held.hub.topics() == []
    # The next subscription asks again.
    again = held.hub.subscribe("t", Recorder())
    held.carrier.waiting.popleft().callback(None)
    result(again)


def test_publishing_is_counted_when_the_carrier_has_accepted_or_rejected_it(held) -> None:
    accepted, rejected = held.hub.publish("t", b"1"), held.hub.publish("t", b"2")
    assert held.hub.counters()["published"] == 0
    held.carrier.waiting.popleft().callback(None)
    held.carrier.waiting.popleft().errback(HubUnavailable("down"))
    assert result(accepted) is None
    assert isinstance(error(rejected), HubUnavailable)
    assert (held.hub.counters()["published"], held.hub.counters()["publish_failed"]) == (1, 1)


# --- presence ---


def test_members_join_and_leave(world) -> None:
    memberships = [result(world.hub.join("t", member)) for member in (b"ann", b"bob", b"ann")]
    result(world.hub.join("other", b"eve"))
    assert result(world.hub.members("t")) == Members((b"ann", b"bob", b"ann"), 3)
    memberships[0].leave()
    memberships[0].leave()
    assert result(world.hub.members("t")) == Members((b"bob", b"ann"), 2)
    assert result(world.hub.members("none")) == Members((), 0)
    assert world.hub.counters()["members"] == 3


@pytest.mark.parametrize(
    "operation",
    [
        lambda hub: hub.subscribe("t", Recorder()),
        lambda hub: hub.join("t", b"ann"),
        lambda hub: hub.claim("k", b"ann"),
    ],
)
def test_an_operation_whose_caller_cancels_it_and_forgets_it_is_not_logged_as_an_error(held, operation) -> None:
    logged: list[Any] = []
    globalLogPublisher.addObserver(logged.append)
    try:
        operation(held.hub).cancel()
        gc.collect()
    finally:
        globalLogPublisher.removeObserver(logged.append)
    assert logged == []


def test_a_snapshot_of_members_is_bounded(world) -> None:
    for number in range(MOST_MEMBERS + 5):
        world.hub.join("t", b"%d" % number)
    found = result(world.hub.members("t"))
    assert (len(found.members), found.total) == (MOST_MEMBERS, MOST_MEMBERS + 5)


def test_a_membership_that_is_cancelled_or_rejected_ends(held) -> None:
    cancelled, rejected = held.hub.join("t", b"ann"), held.hub.join("t", b"bob")
    found = outcomes(cancelled)
    cancelled.cancel()
    assert isinstance(found[0], CancelledError)
    assert held.carrier.calls == [("join", 1, "t", b"ann"), ("join", 2, "t", b"bob"), ("leave", 1, "t", b"ann")]
    held.carrier.waiting.popleft().callback(None)
    held.carrier.waiting.popleft().errback(HubUnavailable("down"))
    assert isinstance(error(rejected), HubUnavailable)
    assert held.hub.memberships() == []


# --- claims ---


def test_a_key_has_one_holder_until_it_is_released(world) -> None:
    claim = result(world.hub.claim("name", b"ann"))
    lost = outcomes(claim.lost)
    assert result(world.hub.claim("name", b"bob")) is None
    assert world.hub.counters()["claims"] == 1
    claim.release()
    claim.release()
    assert lost == []
    second = result(world.hub.claim("name", b"bob"))
    claim.release()  # does not end the claim of another holder
    assert second is not None
    assert result(world.hub.claim("name", b"eve")) is None


def test_a_lost_claim_is_reported_once(held) -> None:
    waiting = held.hub.claim("name", b"ann")
    held.carrier.waiting.popleft().callback(True)
    claim = result(waiting)
    lost = outcomes(claim.lost)
    held.hub.lose(1)
    held.hub.lose(1)
    assert lost == [None]
    claim.release()
    assert held.carrier.calls == [("claim", 1, "name", b"ann")]
    assert held.hub.claims() == []


def test_a_claim_that_is_cancelled_before_it_is_granted_is_released(held) -> None:
    waiting = held.hub.claim("name", b"ann")
    outcome = outcomes(waiting)
    waiting.cancel()
    assert isinstance(outcome[0], CancelledError)
    held.carrier.waiting.popleft().callback(True)
    assert held.carrier.calls == [("claim", 1, "name", b"ann"), ("release", 1, "name", b"ann")]
    assert held.hub.counters()["claims"] == 0


def test_a_failed_claim_is_not_held(held) -> None:
    waiting = held.hub.claim("name", b"ann")
    held.carrier.waiting.popleft().errback(HubUnavailable("down"))
    assert isinstance(error(waiting), HubUnavailable)
    assert held.hub.claims() == []


# --- start and stop ---


def use(hub: Hub) -> list[Deferred[Any]]:
    """Call each method of a hub."""
    return [
        hub.publish("t", b""),
        hub.subscribe("t", Recorder()),
        hub.join("t", b""),
        hub.members("t"),
        hub.claim("k", b""),
    ]


def test_a_hub_that_is_not_started_or_has_stopped_is_unavailable(world) -> None:
    new = Hub(LocalCarrier(), Logger(observer=world.events.append))
    assert (new.up, new.started, new.used) == (False, False, False)
    assert [str(error(each)) for each in use(new)] == ["the hub is new"] * 5
    assert (world.hub.up, world.hub.started, world.hub.used) == (True, True, True)
    result(world.hub.stop())
    assert (world.hub.up, world.hub.started, world.hub.used) == (False, False, True)
    assert [str(error(each)) for each in use(world.hub)] == ["the hub is stopped"] * 5


def test_a_stop_ends_all_that_waits_and_all_deliveries(held) -> None:
    receiver = Recorder()
    active = held.hub.subscribe("active", receiver)
    held.carrier.waiting.popleft().callback(None)
    subscription = result(active)
    found = list(map(outcomes, use(held.hub)))
    held.hub.deliver("active", b"1")
    result(held.hub.stop())
    held.run()
    assert receiver.got == []
    assert [[type(each) for each in some] for some in found] == [[HubUnavailable]] * 5
    subscription.cancel()
    assert held.carrier.calls[-1] == ("stop",)
    assert held.reactor.getDelayedCalls() == []
    counters = held.hub.counters()
    assert {name: counters[name] for name in HUB_GAUGES if counters.get(name)} == {}


def test_handles_may_be_used_after_the_stop(world) -> None:
    subscription = result(world.hub.subscribe("t", Recorder()))
    membership, claim = result(world.hub.join("t", b"")), result(world.hub.claim("k", b""))
    result(world.hub.stop())
    before = world.hub.counters()
    subscription.cancel()
    membership.leave()
    claim.release()
    assert world.hub.counters() == before


# --- counters ---


def test_the_counters_of_the_carrier_are_added(held) -> None:
    heartbeats = Histogram(HEARTBEATS)
    heartbeats.add(0.0015)
    heartbeats.add(60)
    held.carrier.counts = {"dropped": 2, "reconnects": 3, **heartbeat_counters(heartbeats)}
    held.carrier.up = True
    for _ in range(3):
        held.hub.subscribe("t", Recorder())
    held.carrier.waiting.popleft().callback(None)
    held.hub.deliver("t", b"1")
    held.run()
    assert held.hub.counters() == {
        **{"up": 1, "published": 0, "publish_failed": 0, "delivered": 3, "dropped": 2, "gaps": 0, "reconnects": 3},
        **{"topics": 1, "subscriptions": 3, "members": 0, "claims": 0},
        **{"heartbeat_2": 1, f"heartbeat_{len(HEARTBEATS)}": 1, "heartbeat_us": 60_001_500},
    }


@pytest.mark.parametrize("url", ["", "redis://127.0.0.1:1"])
def test_each_counter_of_the_hub_is_declared(url) -> None:
    """A worker that reports another one would be replaced."""
    if url:
        pytest.importorskip("hiredis")
    hub = Hub(make_carrier(url, Logger(observer=[].append)), Logger(observer=[].append))
    known = {CounterKey("hub", name) for name in (*HUB_TOTALS, *HUB_GAUGES)}
    known |= {CounterKey("hub_heartbeat", str(bucket)) for bucket in range(len(HEARTBEATS) + 1)}
    assert hub_counters(hub.counters()).keys() <= {*known, CounterKey("hub_heartbeat_us")}


# --- at random ---


@pytest.mark.parametrize("seed", range(4))
def test_random_operations_agree_with_a_simple_model(seed) -> None:
    choose = random.Random(seed)
    world = World()
    names = ["a", "b", "c"]
    subscriptions: list[tuple[str, Any, Recorder, list[bytes]]] = []
    members: list[tuple[str, bytes, Any]] = []
    claims: dict[str, Any] = {}
    published = 0
    for number in range(5000):
        topic = choose.choice(names)
        match choose.choice(("subscribe", "cancel", *["publish"] * 3, "run", "join", "leave", "claim", "release")):
            case "subscribe" if len(subscriptions) < 20:
                recorder = Recorder()
                subscriptions.append((topic, result(world.hub.subscribe(topic, recorder)), recorder, []))
            case "cancel" if subscriptions:
                topic, subscription, recorder, expected = subscriptions.pop(choose.randrange(len(subscriptions)))
                subscription.cancel()
                assert recorder.got == expected[: len(recorder.got)]
            case "publish":
                result(world.hub.publish(topic, b"%d" % number))
                published += 1
                for of_topic, _, _, expected in subscriptions:
                    if of_topic == topic:
                        expected.append(b"%d" % number)
            case "run":
                world.run()
                assert all(recorder.got == expected for _, _, recorder, expected in subscriptions)
            case "join":
                members.append((topic, b"%d" % number, result(world.hub.join(topic, b"%d" % number))))
            case "leave" if members:
                members.pop(choose.randrange(len(members)))[2].leave()
            case "claim":
                claim = result(world.hub.claim(topic, b""))
                assert (claim is None) == (topic in claims)
                claims.setdefault(topic, claim)
            case "release" if topic in claims:
                claims.pop(topic).release()
        found = result(world.hub.members(topic))
        assert found == Members(tuple(member for of, member, _ in members if of == topic), len(found.members))
        counters = world.hub.counters()
        assert counters["topics"] == len({topic for topic, *_ in subscriptions})
        assert (counters["subscriptions"], counters["members"]) == (len(subscriptions), len(members))
        assert (counters["claims"], counters["published"], counters["gaps"]) == (len(claims), published, 0)
