"""The chat, and the example of a protocol on the hub, in two services that share a Redis."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.chat_client import ChatClient
from tests.support.listen_options import TCP
from tests.support.repository import ROOT

pytest.importorskip("hiredis")

from tests.support.redis import RedisServer, needs_redis  # it needs hiredis

pytestmark = needs_redis


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path, {}).start()
    yield server
    server.kill()


@pytest.fixture
def chats(service, redis) -> Iterator[Callable[[], tuple[Any, ...]]]:
    """Start two services; return them, and a client of each."""
    clients: list[ChatClient] = []

    def start() -> tuple[Any, ...]:
        running = [service("--protocol=chat", TCP, f"--hub={redis.url}") for _ in range(2)]
        for each in running:
            each.wait_event("hub.connected")
            clients.append(ChatClient(each.port))
        return (*running, *clients)

    yield start
    for client in clients:
        client.socket.close()


def test_rooms_nicknames_and_presence_are_shared(chats, wait_for) -> None:
    first, second, ann, bob = chats()
    ann.send("ann", "/join tea")
    ann.wait_for("* ann has joined tea")
    assert "taken" in bob.answer("Ann")
    bob.send("bob", "/join tea")
    bob.wait_for("* bob has joined tea")
    ann.wait_for("* bob has joined tea")
    assert bob.answer("/who") == ann.answer("/who") == "* ann bob"
    assert bob.answer("/rooms") == "* tea"
    ann.send(*(f"line {number}" for number in range(500)))
    for client in (ann, bob):
        client.wait_for(*(f"ann: line {number}" for number in range(500)))
    ann.send("/nick anna")
    bob.wait_for("* ann is now anna")
    # The line is sent before the member with the new name.
    wait_for(lambda: bob.answer("/who") == "* anna bob")
    assert first.stop() == 0
    bob.wait_for("* anna has left tea")
    wait_for(lambda: bob.answer("/who") == "* bob")
    assert second.stop() == 0


def test_a_restart_of_redis_shows_notices_and_the_chat_continues(chats, redis, wait_for) -> None:
    first, second, ann, bob = chats()
    for client, nick in ((ann, "ann"), (bob, "bob")):
        client.send(nick, "/join tea")
        client.wait_for(f"* {nick} has joined tea")
    ann.wait_for("* bob has joined tea")
    redis.kill()
    first.wait_event("hub.connection_lost")
    second.wait_event("hub.connection_lost")
    assert ann.answer("hello") == "* the chat is not available: your line was not sent"
    assert ann.answer("/nick anna").startswith("* the chat is not available: your nickname was not set")
    redis.start()
    for client in (ann, bob):
        client.wait_for("* lines may be missing")
    # The notice is sent before the hub is up again.
    for running in (first, second):
        running.wait_event("hub.connected", 2)
    ann.send("hello again")
    for client in (ann, bob):
        client.wait_for("ann: hello again")
    wait_for(lambda: bob.answer("/who") == "* ann bob")
    assert "taken" in bob.answer("/nick ANN")


def test_the_example_connects_two_services(service, redis, environment) -> None:
    environment["PYTHONPATH"] = str(ROOT / "docs" / "examples")
    ports = []
    for _ in range(2):
        running = service("--protocol=live:Live", TCP, f"--hub={redis.url}")
        running.wait_event("hub.connected")
        ports.append(running.port)
    ann, bob = (ChatClient(port, b"* welcome") for port in ports)
    ann.send("hello")
    for client in (ann, bob):
        client.wait_for_text(b": hello\n")
        client.socket.close()
