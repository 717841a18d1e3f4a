"""Redis that the hub cannot use: each reason is one clear record without secrets, and the hub tries again."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.protocol import Factory, Protocol

from rtservice.hub import redis as redis_carrier
from rtservice.hub.redis import RedisCarrier
from rtservice.hub.redis_url import BadHubURL, parse_hub_url
from tests.support.eventually import eventually
from tests.support.free_port import free_port
from tests.support.hub_load import Receiver
from tests.support.recorded import recorded
from tests.support.redis import needs_redis

pytestmark = [needs_redis, pytest.mark.usefixtures("quick_beats")]

SECRET = "hunter2-secret"


async def problem_of(hub: Any, records: list[dict[str, Any]]) -> str:
    """Wait for two attempts to connect; return the problem, which must be logged once, on one line without secrets."""
    await eventually(lambda: hub._carrier._attempts >= 2)
    logged = recorded(records, "hub.unavailable")
    assert len(logged) == 1, logged
    assert SECRET not in str(records)
    assert "\n" not in logged[0]["problem"]
    assert not recorded(records, "hub.exception")
    return str(logged[0]["problem"])


@pytest_twisted.ensureDeferred
async def test_a_user_with_a_password_is_authenticated(redis, hub, records) -> None:
    server = redis()
    server.call(
        "ACL",
        "SETUSER",
        "ann",
        "on",
        f">{SECRET}",
        "resetchannels",
        "~chat:*",
        "&chat:*",
        "+@all",
        "-@dangerous",
        "+role",
    )
    server.call("ACL", "SETUSER", "default", "off")
    one = hub(f"redis://ann:{SECRET}@127.0.0.1:{server.port}?prefix=chat")
    receiver = Receiver()
    await one.subscribe("room", receiver)
    await one.join("room", b"ann")
    await one.publish("room", b"1")
    await eventually(lambda: receiver.got)
    assert (await one.members("room")).total == 1
    assert SECRET not in str(records)
    assert not recorded(records, "hub.refused")


@pytest_twisted.ensureDeferred
async def test_the_documented_permissions_suffice(redis, hub, records) -> None:
    server = redis()
    assert redis_carrier.__doc__
    permissions = re.findall(r"^    ([~+].*)$", redis_carrier.__doc__, re.MULTILINE)
    server.call("ACL", "SETUSER", "ann", "on", f">{SECRET}", "resetchannels", *" ".join(permissions).split())
    one, two = (hub(f"redis://ann:{SECRET}@127.0.0.1:{server.port}/1") for _ in range(2))
    for each in one, two:
        membership = await each.join("room", b"ann")
        assert (await each.members("room")).total == 1
        claim = await each.claim("ann", b"")
        claim.release()
        membership.leave()
        subscription = await each.subscribe("room", Receiver())
        subscription.cancel()
        await each.publish("room", b"")
    server.call("CLIENT", "KILL", "TYPE", "pubsub")
    await eventually(lambda: one.counters()["reconnects"] and two.counters()["reconnects"])
    await one.stop()
    assert not recorded(records, "hub.refused")
    assert server.call("ACL", "LOG") == []


@pytest.mark.parametrize(
    ("login", "setup", "expected"),
    [
        ("", ["CONFIG", "SET", "requirepass", "other"], "needs a password"),
        (f":{SECRET}@", ["CONFIG", "SET", "requirepass", "other"], "wrong user or password"),
        (f"eve:{SECRET}@", ["PING"], "wrong user or password"),
        (f"ann:{SECRET}@", ["ACL", "SETUSER", "ann", "on", f">{SECRET}", "+@all", "&*", "~*", "-role"], "ROLE: NOPERM"),
        (
            f"ann:{SECRET}@",
            ["ACL", "SETUSER", "ann", "on", f">{SECRET}", "+@all", "~*", "resetchannels"],
            "SUBSCRIBE: NOP",
        ),
    ],
)
@pytest_twisted.ensureDeferred
async def test_refusals_of_redis(redis, hub, records, login, setup, expected) -> None:
    server = redis()
    server.call(*setup)
    assert re.search(expected, await problem_of(hub(f"redis://{login}127.0.0.1:{server.port}"), records))


@pytest_twisted.ensureDeferred
async def test_too_many_clients(redis, hub, records) -> None:
    server = redis()
    await hub(server.url).join("room", b"ann")
    server.call("CONFIG", "SET", "maxclients", "1")
    assert "limit of clients" in await problem_of(hub(server.url), records)


@pytest_twisted.ensureDeferred
async def test_a_database_that_does_not_exist(redis, hub, records) -> None:
    assert "database 99: ERR" in await problem_of(hub(f"{redis().url}/99"), records)


@pytest_twisted.ensureDeferred
async def test_a_read_only_replica(redis, hub, records) -> None:
    master = redis()
    replica = redis({"replicaof": f"127.0.0.1 {master.port}"})
    assert "is a replica of" in await problem_of(hub(replica.url), records)


@pytest_twisted.ensureDeferred
async def test_a_redis_cluster(redis, hub, records) -> None:
    assert "Redis Cluster" in await problem_of(hub(redis({"cluster-enabled": "yes"}).url), records)


@pytest_twisted.ensureDeferred
async def test_a_port_without_a_server(hub, records) -> None:
    assert "refused" in await problem_of(hub(f"redis://u:{SECRET}@127.0.0.1:{free_port()}"), records)


@pytest_twisted.ensureDeferred
async def test_a_host_that_does_not_exist(hub, records) -> None:
    assert "host name not found" in await problem_of(hub(f"redis://u:{SECRET}@redis.invalid"), records)


@pytest_twisted.ensureDeferred
async def test_a_socket_that_does_not_exist(hub, records, tmp_path) -> None:
    assert "No such file" in await problem_of(hub(f"redis+unix://u:{SECRET}@{tmp_path}/none"), records)


class Answers(Protocol):
    """Answers the first request with the data of the factory."""

    def dataReceived(self, data: bytes) -> None:
        self.transport.write(self.factory.answer)


@pytest.fixture
def fake() -> Any:
    """Start servers that answer each request with some data, and return the URL."""
    ports: list[Any] = []

    def start(answer: bytes) -> str:
        factory = Factory.forProtocol(Answers)
        factory.noisy = False
        factory.answer = answer
        ports.append(reactor.listenTCP(0, factory, interface="127.0.0.1"))
        return f"redis://u:{SECRET}@127.0.0.1:{ports[-1].getHost().port}"

    yield start
    for port in ports:
        pytest_twisted.blockon(port.stopListening())


UNKNOWN = f"-ERR unknown command `HELLO`, with args beginning with: `3`, `AUTH`, `u`, `{SECRET}`\r\n".encode()
HELLO = b"%%2\r\n$7\r\nversion\r\n$5\r\n%b\r\n$4\r\nmode\r\n$10\r\nstandalone\r\n"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "not the protocol of Redis"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not the protocol of Redis"),
        (UNKNOWN, "version 6.2 or later is needed"),
        (b"-DENIED Redis is running in protected mode because\r\n", "protected mode"),
        (b"-NOPROTO unsupported protocol version\r\n", "RESP3"),
        (b"+OK\r\n", "did not answer HELLO"),
        (b"*2\r\n$1\r\na\r\n$1\r\nb\r\n", "did not answer HELLO"),
        (HELLO % b"6.0.1", "version 6.0.1"),
        (HELLO % b"\xff\xff\xff\xff\xff", "version"),
        (b"-ERR AUTH <password> called without any password configured for the default user\r\n", "remove it from"),
        (b"$1073741824\r\n" + b"x" * (5 << 20), "more than 4 MiB"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_servers_that_are_no_redis(fake, hub, records, answer, expected) -> None:
    assert expected in await problem_of(hub(fake(answer)), records)


@pytest.mark.usefixtures("quick_timeouts")
@pytest.mark.parametrize("answer", [b"$1073741824\r\n", b"*1\r\n" * 100, b""])
@pytest_twisted.ensureDeferred
async def test_servers_that_do_not_complete_a_reply(fake, hub, records, answer) -> None:
    assert "no reply within" in await problem_of(hub(fake(answer)), records)


# --- TLS ---


@pytest.fixture
def secure(redis, certificates) -> Callable[..., Any]:
    """Start a Redis with TLS, with the certificate of this name."""

    def start(name: str, **options: str) -> Any:
        files = {"tls-cert-file": certificates[f"{name}.pem"], "tls-key-file": certificates[f"{name}.key"]}
        files |= {"tls-ca-cert-file": certificates["ca.pem"], "tls-auth-clients": "no"}
        return redis({**files, **options}, tls=True)

    return start


@pytest_twisted.ensureDeferred
async def test_tls_carries_messages_of_all_sizes(secure, hub, certificates) -> None:
    url = f"rediss://localhost:{secure('server').port}?cafile={certificates['ca.pem']}"
    one, two = hub(url), hub(url)
    receiver = Receiver()
    await one.subscribe("room", receiver)
    await two.join("room", b"ann")
    sizes = [0, 1, 16383, 16384, 16385, 1 << 20]
    for size in sizes:
        await two.publish("room", b"x" * size)
    await eventually(lambda: len(receiver.got) == len(sizes))
    assert [len(message) for message in receiver.got] == sizes


@pytest_twisted.ensureDeferred
async def test_a_client_certificate_is_sent(secure, hub, records, certificates) -> None:
    server = secure("server", **{"tls-auth-clients": "yes"})
    url = f"rediss://localhost:{server.port}?cafile={certificates['ca.pem']}"
    problem = await problem_of(hub(url), records)
    assert "TLS" in problem or "certificate" in problem or "connection" in problem
    await hub(f"{url}&certfile={certificates['client.pem']}&keyfile={certificates['client.key']}").join("room", b"")


@pytest.mark.parametrize(
    ("host", "certificate", "authority", "expected"),
    [
        ("localhost", "server", "other.pem", "certificate rejected: unable to get local issuer|self-signed"),
        ("localhost", "server", "", "certificate rejected"),
        ("127.0.0.2", "server", "ca.pem", "certificate rejected: .*127.0.0.2"),
        ("localhost", "named", "ca.pem", "certificate rejected: .*localhost"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_certificates_that_are_rejected(
    secure, hub, records, certificates, host, certificate, authority, expected
) -> None:
    if certificate == "named":
        certificates.make("named", "server", "ca", alternative="DNS:redis.example.org")
    server = secure(certificate, bind="127.0.0.1 127.0.0.2")
    query = f"?cafile={certificates[authority]}" if authority else ""
    problem = await problem_of(hub(f"rediss://u:{SECRET}@{host}:{server.port}{query}"), records)
    assert re.search(expected, problem)


@pytest_twisted.ensureDeferred
async def test_a_certificate_that_is_not_verified_is_logged(secure, hub, records) -> None:
    server = secure("server", bind="127.0.0.2")
    await hub(f"rediss://127.0.0.2:{server.port}?verify=no").join("room", b"")
    assert len(recorded(records, "hub.unverified")) == 1


@pytest.mark.usefixtures("quick_timeouts")
@pytest_twisted.ensureDeferred
async def test_tls_to_a_server_without_it(redis, hub, records) -> None:
    problem = await problem_of(hub(f"rediss://u:{SECRET}@127.0.0.1:{redis().port}"), records)
    assert problem == "no TLS connection within 1 s"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("cafile=/none", "cafile /none: No such file"),
        ("cafile=/etc/passwd", "cafile /etc/passwd: is not a file of certificates"),
        ("certfile=/none", "certfile /none: No such file"),
        ("certfile=/etc/passwd", "certfile /etc/passwd: is not a file"),
    ],
)
def test_files_that_cannot_be_used(options: str, expected: str, records) -> None:
    with pytest.raises(BadHubURL, match=re.escape(expected)):
        RedisCarrier(parse_hub_url(f"rediss://h?{options}"), records)


def test_a_missing_hiredis_is_reported_with_the_way_to_install_it(monkeypatch, records) -> None:
    monkeypatch.setitem(__import__("sys").modules, "hiredis", None)
    with pytest.raises(BadHubURL, match=r"pip install 'rtservice\[redis\]'"):
        RedisCarrier(parse_hub_url("redis://h"), records)
