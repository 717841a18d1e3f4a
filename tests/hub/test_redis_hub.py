"""Hubs of several processes on a Redis: messages, members and claims."""

from __future__ import annotations

import random

import pytest
import pytest_twisted

from rtservice.interfaces import HubUnavailable
from tests.support.connected import connected
from tests.support.eventually import eventually
from tests.support.hub_load import GAP, Receiver
from tests.support.redis import needs_redis

pytestmark = needs_redis


@pytest_twisted.ensureDeferred
async def test_a_message_reaches_the_receivers_of_all_processes_once_and_unchanged(redis, hub) -> None:
    url = redis().url
    hubs = [hub(url) for _ in range(3)]
    receivers = [Receiver() for _ in hubs]
    for each, receiver in zip(hubs, receivers, strict=True):
        await each.subscribe("the röom", receiver)
    messages = [bytes(range(256)), b"", b"\r\n$5\r\n", b"x" * (1 << 20)]
    for message in messages:
        await hubs[0].publish("the röom", message)
    await eventually(lambda: all(len(receiver.got) == len(messages) for receiver in receivers))
    assert [receiver.got for receiver in receivers] == [messages] * 3


@pytest_twisted.ensureDeferred
async def test_messages_of_other_topics_databases_of_prefixes_are_separate(redis, hub) -> None:
    url = redis().url
    first, second = hub(url), hub(f"{url}?prefix=other")
    receiver, other = Receiver(), Receiver()
    await first.subscribe("room", receiver)
    await second.subscribe("room", other)
    await first.publish("elsewhere", b"1")
    await second.publish("room", b"2")
    await first.publish("room", b"3")
    await first.join("room", b"member")
    await eventually(lambda: receiver.got and other.got)
    assert (receiver.got, other.got) == ([b"3"], [b"2"])
    assert (await second.members("room")).total == 0


@pytest_twisted.ensureDeferred
async def test_a_topic_that_is_cancelled_and_subscribed_in_quick_succession_ends_as_wanted(redis, hub) -> None:
    url = redis().url
    near, far = hub(url), hub(url)
    await connected(near, far)
    rng = random.Random(1)
    for turn in range(60):
        subscription = near.subscribe("room", Receiver())
        for _ in range(rng.randrange(6)):
            subscription.addCallback(lambda active: active.cancel())
            subscription.addErrback(lambda _: None)
            if rng.random() < 0.5:
                subscription.cancel()
            if rng.random() < 0.5:
                await near.members("room")
            subscription = near.subscribe("room", Receiver())
        receiver = Receiver()
        last = await near.subscribe("room", receiver)
        active = await subscription
        await far.publish("room", b"%d" % turn)
        await eventually(lambda receiver=receiver: receiver.got)
        assert receiver.got == [b"%d" % turn]
        active.cancel()
        if rng.random() < 0.7:
            last.cancel()


@pytest_twisted.ensureDeferred
async def test_a_topic_without_receivers_is_unsubscribed(redis, hub) -> None:
    server = redis()
    one = hub(server.url)
    subscription = await one.subscribe("room", Receiver())
    assert server.call("PUBSUB", "NUMSUB", "rtservice:t:room")[1] == 1
    subscription.cancel()
    await eventually(lambda: server.call("PUBSUB", "NUMSUB", "rtservice:t:room")[1] == 0)


@pytest_twisted.ensureDeferred
async def test_members_are_seen_by_all_processes_until_they_leave(redis, hub) -> None:
    url = redis().url
    one, two = hub(url), hub(url)
    membership = await one.join("room", b"ann")
    await two.join("room", b"bob")
    await two.join("room", b"bob")
    for each in one, two:
        members = await each.members("room")
        assert (sorted(members.members), members.total) == ([b"ann", b"bob", b"bob"], 3)
    membership.leave()
    assert (await one.members("room")).total == 2


@pytest_twisted.ensureDeferred
async def test_the_answer_with_members_is_bounded(redis, hub) -> None:
    one = hub(redis().url)
    await one.join("room", b"0")
    for number in range(1, 1500):
        last = one.join("room", b"%d" % number)
    await last
    members = await one.members("room")
    assert (len(members.members), len(set(members.members)), members.total) == (1000, 1000, 1500)


@pytest_twisted.ensureDeferred
async def test_a_key_has_one_holder_in_all_processes(redis, hub) -> None:
    url = redis().url
    one, two = hub(url), hub(url)
    await connected(one, two)
    claims = [one.claim("ann", b"1"), two.claim("ann", b"2"), one.claim("ann", b"3"), two.claim("bob", b"4")]
    results = [await claim for claim in claims]
    assert [result is not None for result in results].count(True) == 2
    holder = next(result for result in results[:3] if result)
    holder.release()
    await one.members("ready")
    assert await two.claim("ann", b"5") is not None
    holder.release()  # a second call does nothing
    await one.members("ready")
    assert await one.claim("ann", b"6") is None


@pytest_twisted.ensureDeferred
async def test_a_hub_that_stops_removes_its_members_and_claims_at_once(redis, hub) -> None:
    server = redis()
    one, two = hub(server.url), hub(server.url)
    for number in range(250):
        last = one.join(f"room{number}", b"ann")
    await last
    await one.claim("ann", b"")
    await two.join("ready", b"")
    await one.stop()
    assert (await two.members("room7")).total == 0
    assert await two.claim("ann", b"") is not None
    await two.stop()
    assert server.call("KEYS", "*") == []


@pytest_twisted.ensureDeferred
async def test_stop_sends_what_was_accepted_and_fails_what_waits(redis, hub, quick_beats) -> None:
    server = redis()
    one, two = hub(server.url), hub(server.url)
    receiver = Receiver()
    await two.subscribe("room", receiver)
    await one.join("ready", b"")
    published = [one.publish("room", b"%d" % number) for number in range(100)]
    await one.stop()
    for each in published:
        await each
    await eventually(lambda: len(receiver.got) == 100)
    server.kill()
    await eventually(lambda: not two.up)
    waits = [two.subscribe("other", receiver), two.join("room", b"ann")]
    await two.stop()
    for each in waits:
        with pytest.raises(HubUnavailable):
            await each


@pytest_twisted.ensureDeferred
async def test_without_an_engine_requests_fail_at_once_and_subscriptions_wait(redis, hub) -> None:
    server = redis()
    server.kill()
    one = hub(server.url)
    receiver = Receiver()
    subscription, membership = one.subscribe("room", receiver), one.join("room", b"ann")
    for request in (one.publish("room", b""), one.members("room"), one.claim("ann", b"")):
        with pytest.raises(HubUnavailable):
            await request
    assert not one.up
    server.start()
    await subscription
    await membership
    assert one.up
    await one.publish("room", b"1")
    await eventually(lambda: receiver.got)
    assert receiver.got == [b"1"]
    assert GAP not in receiver.got
    assert (await one.members("room")).members == (b"ann",)


@pytest_twisted.ensureDeferred
async def test_a_unix_socket_and_a_database_are_used(redis, hub) -> None:
    server = redis()
    one = hub(f"redis+unix://{server.socket}?db=3")
    await one.join("room", b"ann")
    assert b"db3:keys" in server.call("INFO", "keyspace")
