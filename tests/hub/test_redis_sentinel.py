"""Redis with sentinels: the hub finds the master, and follows a failover."""

from __future__ import annotations

import pytest
import pytest_twisted

from tests.support.eventually import eventually
from tests.support.hub_load import Load
from tests.support.recorded import recorded
from tests.support.redis import needs_redis, needs_sentinel

pytestmark = [needs_redis, needs_sentinel, pytest.mark.usefixtures("quick_beats")]


@pytest_twisted.async_yield_fixture
async def load(group, hub):
    """A load on three hubs."""
    running = Load([hub(group.url) for _ in range(3)], ["one", "two", "three"])
    await running.start()
    yield running
    running.stop()


async def runs(load: Load, count: int = 500) -> None:
    """Wait until this many more messages are accepted."""
    goal = load.accepted + count
    await eventually(lambda: load.accepted >= goal)


async def all_use(load: Load, port: int) -> None:
    """Wait until all hubs use the server with this port."""
    await eventually(
        lambda: all(hub.up and f":{port}" in hub._carrier._endpoints.shown.split("master ")[1] for hub in load.hubs)
    )


async def ends_well(load: Load) -> None:
    """Stop the load, and check what arrived."""
    await runs(load)
    load.stop()
    await eventually(load.complete)
    load.check()
    assert all(receiver.gaps for receiver in load.receivers.values())


@pytest_twisted.ensureDeferred
async def test_a_failover_on_request_loses_nothing_without_a_gap(group, load, records) -> None:
    await runs(load)
    membership = await load.hubs[0].join("room", b"ann")
    claim = await load.hubs[0].claim("ann", b"")
    assert group.sentinels[0].call("SENTINEL", "FAILOVER", "mymaster") == b"OK"
    await all_use(load, group.replica.port)
    await ends_well(load)
    assert (await load.hubs[1].members("room")).members == (b"ann",)
    assert await load.hubs[1].claim("ann", b"") is None
    membership.leave()
    claim.release()
    assert not recorded(records, "hub.exception")


@pytest_twisted.ensureDeferred
async def test_a_master_that_is_killed_is_replaced(group, load) -> None:
    await runs(load)
    group.master.kill()
    await all_use(load, group.replica.port)
    await ends_well(load)


@pytest.mark.usefixtures("quick_timeouts")
@pytest_twisted.ensureDeferred
async def test_a_master_that_is_stopped_and_continues_later_is_replaced(group, load) -> None:
    await runs(load)
    group.master.freeze()
    await all_use(load, group.replica.port)
    group.master.thaw()
    await runs(load, 3000)
    await all_use(load, group.replica.port)
    await ends_well(load)


@pytest_twisted.ensureDeferred
async def test_sentinels_that_are_down_are_skipped(group, hub) -> None:
    group.sentinels[0].kill()
    group.sentinels[1].freeze()
    one = hub(group.url)
    await one.join("room", b"ann")
    group.sentinels[1].thaw()
    assert f"master 127.0.0.1:{group.master.port}" in one._carrier._endpoints.shown


def heartbeats(hub) -> int:
    """Return the number of heartbeats that came back."""
    counts = {name: count for name, count in hub.counters().items() if name.startswith("heartbeat_")}
    return sum(counts.values()) - counts["heartbeat_us"]


@pytest_twisted.ensureDeferred
async def test_a_hub_stays_connected_without_any_sentinel(group, hub) -> None:
    one = hub(group.url)
    await one.join("room", b"ann")
    for sentinel in group.sentinels:
        sentinel.kill()
    beats = heartbeats(one)
    await eventually(lambda: heartbeats(one) > beats + 5)
    assert one.up
    assert one.counters()["reconnects"] == 0


@pytest_twisted.ensureDeferred
async def test_an_old_master_that_sentinels_do_not_name_any_more_is_left(group, hub, records) -> None:
    """It still works as a master: as when only the sentinels and the replica cannot reach it."""
    one = hub(group.url)
    await one.join("room", b"ann")
    for sentinel in group.sentinels:
        sentinel.call("SENTINEL", "REMOVE", "mymaster")
        sentinel.call("SENTINEL", "MONITOR", "mymaster", "127.0.0.1", group.replica.port, 2)
    group.replica.call("REPLICAOF", "NO", "ONE")
    await eventually(lambda: one.counters()["reconnects"] and one.up)
    assert recorded(records, "hub.connection_lost")[0]["problem"] == "the sentinels name another master"
    assert f":{group.replica.port}" in recorded(records, "hub.connected")[-1]["engine"]


@pytest.mark.parametrize(
    ("rest", "expected"),
    [("unknown", "does not know the master unknown"), ("mymaster?sentinel_password=x", "refused the request")],
)
@pytest_twisted.ensureDeferred
async def test_the_answer_of_the_first_sentinel_is_the_problem(group, hub, records, rest, expected) -> None:
    hub(group.url.replace("mymaster", rest))
    (record,) = await eventually(lambda: recorded(records, "hub.unavailable"))
    assert expected in record["problem"]
    assert f"sentinel 127.0.0.1:{group.sentinels[0].port}" in record["problem"]


@pytest_twisted.ensureDeferred
async def test_a_url_of_a_server_that_is_a_sentinel_is_reported(group, hub, records) -> None:
    hub(group.sentinels[0].url)
    (record,) = await eventually(lambda: recorded(records, "hub.unavailable"))
    assert "redis+sentinel://" in record["problem"]


@pytest_twisted.ensureDeferred
async def test_sentinels_and_master_have_separate_passwords(group, hub, records) -> None:
    for sentinel in group.sentinels:
        sentinel.call("ACL", "SETUSER", "bob", "on", ">inner-secret", "+@all", "&*", "~*")
        sentinel.call("ACL", "SETUSER", "default", "off")
    group.master.call("ACL", "SETUSER", "ann", "on", ">outer-secret", "+@all", "&*", "~*")
    url = group.url.replace("://", "://ann:outer-secret@")
    one = hub(f"{url}?sentinel_user=bob&sentinel_password=inner-secret")
    await one.join("room", b"ann")
    assert "secret" not in str(records)
