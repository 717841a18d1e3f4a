"""Failures of Redis under load: each message arrives in order, or a gap does, and the hub recovers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import CancelledError
from twisted.logger import Logger

from rtservice.hub import redis as redis_carrier
from rtservice.hub.hub import Hub
from rtservice.hub.redis import RedisCarrier
from rtservice.hub.redis_url import parse_hub_url
from rtservice.interfaces import HubFull, HubUnavailable, Members
from tests.support.connected import connected
from tests.support.eventually import answers, eventually
from tests.support.hub_load import GAP, Load, Receiver
from tests.support.recorded import recorded
from tests.support.redis import RedisServer, needs_redis
from tests.support.tampering import TamperingProxy

pytestmark = [needs_redis, pytest.mark.usefixtures("quick_beats")]

TOPICS = [f"topic{number}" for number in range(5)]


@pytest.fixture
def proxy() -> Iterator[list[TamperingProxy]]:
    """Proxies to close after the test."""
    proxies: list[TamperingProxy] = []
    yield proxies
    for each in proxies:
        pytest_twisted.blockon(each.close())


@pytest_twisted.async_yield_fixture
async def load(hub):
    """Start a load on hubs of these URLs; it stops after the test."""
    loads: list[Load] = []

    async def start(*urls: str) -> Load:
        started = Load([hub(url) for url in urls], TOPICS)
        loads.append(started)
        await started.start()
        return started

    yield start
    for each in loads:
        each.stop()


async def runs(load: Load, count: int = 200) -> None:
    """Wait until this many more messages are accepted."""
    goal = load.accepted + count
    await eventually(lambda: load.accepted >= goal)


async def ends_well(load: Load) -> None:
    """Stop the load, and check what arrived."""
    await connected(*load.hubs)
    await runs(load)
    load.stop()
    await eventually(load.complete)
    load.check()


@pytest_twisted.ensureDeferred
async def test_without_failures_nothing_is_missing(redis, load) -> None:
    url = redis().url
    running = await load(url, url, url)
    await runs(running, 3000)
    await ends_well(running)
    assert not running.failed
    assert not any(receiver.gaps for receiver in running.receivers.values())


@pytest_twisted.ensureDeferred
async def test_a_restart_of_redis_is_a_gap_for_every_receiver(redis, load, records) -> None:
    server = redis()
    running = await load(server.url, server.url)
    for _ in range(3):
        await runs(running)
        server.restart()
        await eventually(lambda: not any(hub.up for hub in running.hubs))
        await connected(*running.hubs)
    await ends_well(running)
    assert all(receiver.gaps >= 3 for receiver in running.receivers.values())
    lost = recorded(records, "hub.connection_lost")
    assert len(lost) == 6


@pytest.mark.usefixtures("quick_timeouts")
@pytest_twisted.ensureDeferred
async def test_a_stopped_redis_is_detected_and_used_again(redis, load) -> None:
    server = redis()
    running = await load(server.url, server.url)
    await runs(running)
    server.freeze()
    await eventually(lambda: not any(hub.up for hub in running.hubs))
    server.thaw()
    await ends_well(running)
    assert running.failed
    assert all(receiver.gaps for receiver in running.receivers.values())


@pytest_twisted.ensureDeferred
async def test_a_pause_shorter_than_the_timeout_loses_nothing(redis, load) -> None:
    server = redis()
    running = await load(server.url, server.url)
    await runs(running)
    server.freeze()
    number = running.number
    await eventually(lambda: running.number > number + 50)
    server.thaw()
    await ends_well(running)
    assert not running.failed
    assert not any(receiver.gaps for receiver in running.receivers.values())


@pytest.mark.usefixtures("quick_timeouts")
@pytest_twisted.ensureDeferred
async def test_a_connection_without_messages_is_detected(redis, load, proxy, records) -> None:
    server = redis()
    proxy.append(deaf := TamperingProxy(server.port))
    running = await load(server.url, deaf.url)
    await runs(running)
    deaf.replace = b"$7\r\nmessage\r\n", b"$7\r\nmissing\r\n"
    await eventually(lambda: recorded(records, "hub.connection_lost"))
    deaf.replace = None
    await ends_well(running)
    assert "no heartbeat" in recorded(records, "hub.connection_lost")[0]["problem"]
    assert all(receiver.gaps for (at, _), receiver in running.receivers.items() if at == 1)
    assert not any(receiver.gaps for (at, _), receiver in running.receivers.items() if at == 0)


@pytest.mark.usefixtures("quick_timeouts")
@pytest_twisted.ensureDeferred
async def test_a_network_that_drops_everything_is_detected(redis, load, proxy) -> None:
    server = redis()
    proxy.append(black_hole := TamperingProxy(server.port))
    running = await load(server.url, black_hole.url)
    await runs(running)
    black_hole.silent = True
    await eventually(lambda: not running.hubs[1].up)
    await eventually(lambda: black_hole.connections > 2)  # and so is one that accepts and answers nothing
    assert len(black_hole.half_open) > 0
    black_hole.silent = False
    await ends_well(running)
    # Redis could still execute commands of the connection that it does not know to be lost.
    assert len(server.call("CLIENT", "LIST", "TYPE", "pubsub").splitlines()) == 2


@pytest_twisted.ensureDeferred
async def test_a_connection_that_is_killed_is_a_gap_and_no_duplicate(redis, load) -> None:
    server = redis()
    running = await load(server.url, server.url)
    for _ in range(5):
        await runs(running)
        reconnects = [hub.counters()["reconnects"] for hub in running.hubs]
        server.call("CLIENT", "KILL", "TYPE", "pubsub")
        await eventually(
            lambda before=reconnects: all(
                hub.counters()["reconnects"] > count for hub, count in zip(running.hubs, before, strict=True)
            )
        )
    await ends_well(running)


@pytest_twisted.ensureDeferred
async def test_a_receiver_that_redis_disconnects_for_its_output_gets_a_gap(redis, hub) -> None:
    server = redis({"client-output-buffer-limit": "pubsub 1mb 1mb 1"})
    sender, slow = hub(server.url), hub(server.url)
    receiver = Receiver()
    await slow.subscribe("room", receiver)
    await connected(sender)
    transport = slow._carrier._connection.transport
    transport.pauseProducing()
    for _ in range(16):
        await sender.publish("room", b"x" * (1 << 20))
    await eventually(lambda: len(server.call("CLIENT", "LIST", "TYPE", "pubsub").splitlines()) == 1)
    transport.resumeProducing()
    await eventually(lambda: GAP in receiver.got)
    await sender.publish("room", b"after")
    await eventually(lambda: b"after" in receiver.got)
    assert len(receiver.got) < 18


@pytest_twisted.ensureDeferred
async def test_a_process_that_used_another_server_causes_a_gap_for_the_others(redis, hub, proxy) -> None:
    """As when one process follows a failover later than the others."""
    old, new = redis(), redis()
    proxy.append(address := TamperingProxy(old.port))
    late, early = hub(address.url), hub(new.url)
    receiver = Receiver()
    await early.subscribe("room", receiver)
    await late.subscribe("ready", Receiver())
    await late.publish("room", b"lost")
    address.port = new.port
    address.cut()
    await eventually(lambda: receiver.got)
    assert receiver.got == [GAP]


@pytest.mark.usefixtures("quick_timeouts")
@pytest_twisted.ensureDeferred
async def test_it_causes_one_also_if_its_first_attempts_with_the_new_server_fail(redis, hub, proxy) -> None:
    old, new = redis(), redis()
    proxy.append(address := TamperingProxy(old.port))
    late, early = hub(address.url), hub(new.url)
    receiver = Receiver()
    await early.subscribe("room", receiver)
    await late.subscribe("room", Receiver())
    await late.publish("room", b"lost")
    address.port = new.port
    address.replace = b"$9\r\nsubscribe\r\n", b"$9\r\nsubscripe\r\n"
    greeting = late._carrier._greeting
    address.cut()
    await eventually(lambda: late._carrier._greeting != greeting and address.connections > 2)
    assert GAP not in receiver.got
    address.replace = None
    address.cut()
    await eventually(lambda: receiver.got)
    assert receiver.got == [GAP]


@pytest_twisted.ensureDeferred
async def test_what_was_published_elsewhere_before_a_process_connected_is_no_gap_for_it(redis, hub) -> None:
    server = redis()
    one = hub(server.url)
    receiver = Receiver()
    await one.subscribe("room", receiver)
    for age in (10**9, "invalid", 10**400, 0):
        await one.publish("room", str(age)[:10].encode())
        server.call("PUBLISH", "rtservice:s", age)
    await eventually(lambda: GAP in receiver.got)
    assert receiver.got == [b"1000000000", b"invalid", b"1000000000", b"0", GAP]


@pytest.mark.usefixtures("quick_timeouts")
@pytest_twisted.ensureDeferred
async def test_publishes_in_flight_are_bounded_and_fail_when_the_connection_ends(redis, hub) -> None:
    server = redis()
    one = hub(server.url)
    await one.join("ready", b"")
    server.freeze()
    outcomes: list[type] = []
    for _ in range(40):
        one.publish("room", b"x" * (1 << 20)).addErrback(lambda failure: outcomes.append(failure.type))
    assert outcomes
    assert set(outcomes) == {HubFull}
    await eventually(lambda: len(outcomes) == 40)
    assert set(outcomes) == {HubFull, HubUnavailable}
    server.thaw()


@pytest_twisted.ensureDeferred
async def test_members_and_claims_are_restored_after_redis_lost_its_data(redis, hub) -> None:
    server = redis()
    one, two = hub(server.url), hub(server.url)
    memberships = [one.join(f"room{number}", b"ann") for number in range(350)]
    memberships = [await each for each in memberships]
    await one.claim("ann", b"")
    leaving = await two.join("room7", b"bob")
    server.kill()
    await eventually(lambda: not one.up and not two.up)
    leaving.leave()
    memberships[8].leave()
    server.start()
    await connected(one, two)
    assert (await two.members("room7")).members == (b"ann",)
    assert (await two.members("room8")).total == 0
    assert (await two.members("room349")).total == 1
    assert await two.claim("ann", b"") is None


@pytest_twisted.ensureDeferred
async def test_a_receiver_can_reload_the_members_as_soon_as_it_has_a_gap(redis, hub) -> None:
    class Reloading(Receiver):
        def gap(self, topic: str) -> None:
            reloaded.append(near.members(topic))

    server = redis()
    near, reloaded = hub(server.url), []
    await near.subscribe("room", Reloading())
    await near.join("room", b"member")
    server.restart()
    await eventually(lambda: reloaded)
    assert await reloaded[0] == Members((b"member",), 1)


@pytest.mark.usefixtures("quick_timeouts")
@pytest_twisted.ensureDeferred
async def test_what_is_left_and_released_without_a_connection_is_removed_afterwards(redis, hub, proxy) -> None:
    server = redis()
    proxy.append(address := TamperingProxy(server.port))
    one, two = hub(address.url), hub(server.url)
    membership, claim = await one.join("room", b"ann"), await one.claim("ann", b"")
    await connected(two)
    address.silent = True
    in_flight = one.join("room", b"carl")
    claiming = one.claim("carl", b"")
    with pytest.raises(HubUnavailable):
        await claiming
    await eventually(lambda: not one.up)
    membership.leave()
    claim.release()
    in_flight.cancel()
    in_flight.addErrback(lambda _: None)
    assert (await two.members("room")).members == (b"ann",)
    address.silent = False
    # The changes are sent when the connection is back, and nothing tells this test when Redis has made them.

    async def is_empty() -> bool:
        return (await two.members("room")).total == 0

    await answers(is_empty)
    for key in ("ann", "carl"):
        await answers(lambda key=key: two.claim(key, b""))


@pytest_twisted.ensureDeferred
async def test_nothing_is_kept_of_members_that_join_and_leave_without_a_connection(redis, hub) -> None:
    server = redis()
    server.kill()
    one = hub(server.url)
    kept = one.join("room", b"ann")
    for _ in range(100):
        joining = one.join("room", b"bob")
        joining.addErrback(lambda failure: failure.trap(CancelledError) and None)
        joining.cancel()
    assert not one._carrier._presence._undone
    server.start()
    membership = await kept
    assert (await one.members("room")).members == (b"ann",)
    membership.leave()
    assert (await one.members("room")).total == 0


def end_lease(server: RedisServer, hub: Hub) -> None:
    """End the lease of a process, as if it had not renewed it for long."""
    assert server.call("ZADD", "rtservice:p", "XX", "CH", 1, hub._carrier._presence._incarnation) == 1


@pytest.mark.usefixtures("quick_timeouts")
@pytest_twisted.ensureDeferred
async def test_members_and_claims_of_a_killed_process_disappear_with_its_lease(redis, hub, proxy) -> None:
    server = redis()
    proxy.append(address := TamperingProxy(server.port))
    dead, other, third = hub(address.url), hub(server.url), hub(server.url)
    await other.join("ready", b"")
    await third.join("ready", b"")
    for number in range(250):
        last = dead.join(f"room{number}", b"ann")
    await last
    await dead.claim("ann", b"")
    address.silent = True
    await eventually(lambda: not dead.up)
    assert await other.claim("ann", b"") is None
    end_lease(server, dead)
    assert (await other.members("room7")).total == 0
    assert await other.claim("ann", b"") is not None
    await eventually(lambda: not server.call("KEYS", "rtservice:m:room*"))
    assert len(server.call("KEYS", "rtservice:i:*")) == 2
    assert await third.claim("ann", b"") is None
    address.silent = False


@pytest.mark.usefixtures("quick_timeouts")
@pytest_twisted.ensureDeferred
async def test_a_process_whose_lease_had_ended_claims_again_and_loses_what_others_hold(redis, hub, proxy) -> None:
    server = redis()
    proxy.append(address := TamperingProxy(server.port))
    one, two = hub(address.url), hub(server.url)
    await connected(two)
    await one.join("room", b"ann")
    taken, kept = await one.claim("ann", b""), await one.claim("bob", b"")
    lost: list[str] = []
    taken.lost.addCallback(lambda _: lost.append("ann"))
    kept.lost.addCallback(lambda _: lost.append("bob"))
    address.silent = True
    await eventually(lambda: not one.up)
    end_lease(server, one)
    await two.claim("ann", b"")
    assert not lost
    address.silent = False
    await eventually(lambda: one.up and lost)
    assert lost == ["ann"]
    assert await two.claim("bob", b"") is None
    assert (await two.members("room")).members == (b"ann",)
    assert one.counters()["claims_lost"] == 1


@pytest_twisted.ensureDeferred
async def test_a_lease_that_ends_while_connected_is_restored_by_the_next_heartbeat(redis, hub) -> None:
    server = redis()
    one, two = hub(server.url), hub(server.url)
    await one.join("room", b"ann")
    await one.claim("ann", b"")
    await two.join("ready", b"")
    server.call("FLUSHALL")
    await eventually(lambda: server.call("HLEN", "rtservice:m:room") == 1)
    await eventually(lambda: server.call("EXISTS", "rtservice:c:ann") == 1)
    assert one.counters()["reconnects"] == 0


@pytest_twisted.ensureDeferred
async def test_redis_without_memory_carries_messages_and_gets_members_later(redis, hub, records) -> None:
    server = redis()
    one = hub(server.url)
    receiver = Receiver()
    await one.subscribe("room", receiver)
    server.call("CONFIG", "SET", "maxmemory", "1")
    membership = one.join("room", b"ann")
    with pytest.raises(HubUnavailable, match="OOM"):
        await one.claim("ann", b"")
    await one.publish("room", b"1")
    await eventually(lambda: receiver.got == [b"1"])
    server.call("CLIENT", "KILL", "TYPE", "pubsub")
    await eventually(lambda: one.counters()["reconnects"] == 1)
    await one.publish("room", b"2")
    assert not membership.called
    server.call("CONFIG", "SET", "maxmemory", "0")
    await membership
    assert (await one.members("room")).members == (b"ann",)
    assert await one.claim("ann", b"") is not None
    assert "OOM" in recorded(records, "hub.refused")[0]["problem"]
    assert len(recorded(records, "hub.refused")) <= 3


@pytest_twisted.ensureDeferred
async def test_scripts_that_redis_forgot_still_run(redis, hub) -> None:
    server = redis()
    one = hub(server.url)
    await one.join("room", b"ann")
    server.call("SCRIPT", "FLUSH")
    await one.join("room", b"bob")
    assert (await one.members("room")).total == 2


@pytest_twisted.ensureDeferred
async def test_a_policy_that_evicts_members_is_logged(redis, hub, records) -> None:
    server = redis({"maxmemory": "100mb", "maxmemory-policy": "allkeys-lru"})
    await hub(server.url).join("room", b"ann")
    assert recorded(records, "hub.eviction")


@pytest_twisted.ensureDeferred
async def test_a_master_that_becomes_a_replica_is_left(redis, hub, records) -> None:
    server, master = redis(), redis()
    one = hub(server.url)
    await one.join("room", b"ann")
    server.call("REPLICAOF", "127.0.0.1", master.port)
    await eventually(lambda: not one.up)
    await eventually(lambda: recorded(records, "hub.unavailable"))
    assert f"is a replica of 127.0.0.1:{master.port}" in recorded(records, "hub.connection_lost")[0]["problem"]
    assert "is a replica of" in recorded(records, "hub.unavailable")[0]["problem"]
    server.call("REPLICAOF", "NO", "ONE")
    await connected(one)


@pytest_twisted.ensureDeferred
async def test_each_of_many_receivers_gets_one_gap_after_a_restart(redis, hub) -> None:
    server = redis()
    one = hub(server.url)
    receivers = [Receiver() for _ in range(10)]
    topics = [f"topic{number}" for number in range(2000)]
    for receiver in receivers:
        last = [one.subscribe(topic, receiver) for topic in topics]
    for each in last:
        await each
    server.restart()
    await eventually(lambda: all(len(receiver.got) == len(topics) for receiver in receivers))
    await connected(one)
    assert all(receiver.gaps == len(topics) for receiver in receivers)
    await one.publish("topic1999", b"1")
    await eventually(lambda: all(receiver.messages == [b"1"] for receiver in receivers))


class LateReactor:
    """The reactor, with a clock that a test can set forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def seconds(self) -> float:
        return reactor.seconds() + self.ahead

    def __getattr__(self, name: str) -> Any:
        return getattr(reactor, name)


@pytest.mark.usefixtures("quick_timeouts")
@pytest_twisted.ensureDeferred
async def test_a_process_that_was_stopped_reads_what_it_has_received_before_it_reconnects(redis, monkeypatch) -> None:
    # After SIGCONT, Redis has this long to return the heartbeat.
    monkeypatch.setattr(redis_carrier, "_LATE", 3.0)
    server = redis()
    late, log = LateReactor(), Logger("tests", observer=lambda _: None)
    one = Hub(RedisCarrier(parse_hub_url(f"redis+unix://{server.socket}"), log), log)
    one.start(late)
    await one.join("room", b"ann")
    server.freeze()
    carrier = one._carrier
    await eventually(lambda: not carrier._beat_returned)
    late.ahead = 60.0
    sent, due = carrier._beat, carrier._beat_due
    await eventually(lambda: carrier._beat_due > due)
    server.thaw()
    await eventually(lambda: carrier._beat > sent + 2)
    assert one.counters()["reconnects"] == 0
    await one.stop()


@pytest_twisted.ensureDeferred
async def test_stop_does_not_wait_long_for_a_redis_that_does_not_answer(redis, hub, records, monkeypatch) -> None:
    monkeypatch.setattr(redis_carrier, "STOP_SECONDS", 0.2)
    server = redis()
    one = hub(server.url)
    await one.join("room", b"ann")
    server.freeze()
    published = one.publish("room", b"1")
    await one.stop()
    with pytest.raises(HubUnavailable):
        await published
    assert recorded(records, "hub.stop_incomplete")[0]["problem"] == "no answer in time"
    server.thaw()
