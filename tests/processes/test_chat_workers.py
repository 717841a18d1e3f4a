"""The chat in several workers: one service for its members, also while workers die and are replaced."""

import os
import re
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.chat_client import ChatClient
from tests.support.listen_options import TCP


@pytest.fixture
def chat(workers) -> Iterator[Callable[..., Any]]:
    """Start a chat with workers; return it, and a client of each worker."""
    opened: list[ChatClient] = []

    def start(count: int, *arguments: str) -> tuple[Any, list[ChatClient]]:
        running = workers(f"--workers={count}", "--protocol=chat", TCP, *arguments)
        pids = running.settled(count)
        clients: dict[int, ChatClient] = {}
        while len(clients) < count:
            client = ChatClient(running.service.port)
            opened.append(client)
            clients.setdefault(client.worker(pids), client)
        return running, [clients[pid] for pid in pids]

    yield start
    for client in opened:
        client.socket.close()


@pytest.mark.parametrize("count", [2, 3])
def test_the_members_of_all_workers_are_in_one_room(chat, count) -> None:
    running, members = chat(count)
    for number, member in enumerate(members):
        member.send(f"member-{number}", "/join tea")
        for other in members[: number + 1]:
            other.wait_for(f"* member-{number} has joined tea")
    names = " ".join(f"member-{number}" for number in range(count))
    for member in members:
        assert member.answer("/who") == f"* {names}"
        assert member.answer("/rooms") == "* tea"
        if member is not members[0]:
            taken = "* MEMBER-0 is taken, or looks like a name that is taken"
            assert member.answer("/nick MEMBER-0") == taken
    for number, member in enumerate(members):
        member.send("hello", f"/nick renamed-{number}")
        for other in members:
            other.wait_for(f"member-{number}: hello", f"* member-{number} is now renamed-{number}")
    members[0].send("/quit")
    for other in members[1:]:
        other.wait_for("* renamed-0 has left tea")
    assert running.stop() == 0
    for other in members[1:]:
        other.wait_for("* the chat shuts down")


def test_the_members_of_a_killed_worker_disappear_and_their_nicknames_are_free(chat, wait_for) -> None:
    running, (ann, bob, eve) = chat(3)
    for client, nick in ((ann, "ann"), (bob, "bob"), (eve, "eve")):
        client.send(nick, "/join tea")
        client.wait_for(f"* {nick} has joined tea")
    eve.send("/nick eva")
    eve.wait_for("* eve is now eva")
    os.kill(bob.worker(running.pids()), signal.SIGKILL)
    wait_for(lambda: eve.answer("/who") == "* ann eva")
    wait_for(lambda: eve.answer("/nick bob") == "* eva is now bob")
    wait_for(lambda: ann.answer("/who") == "* ann bob")


def test_every_line_of_all_workers_arrives_in_order_at_all_members(chat) -> None:
    running, members = chat(2)
    for number, member in enumerate(members):
        member.send(f"member-{number}", "/join tea")
        member.wait_for(f"* member-{number} has joined tea")
    members[0].wait_for("* member-1 has joined tea")
    lines = 500
    for member in members:
        member.send(*(f"line {number}" for number in range(lines)))
    for member in members:
        received: dict[str, list[int]] = {}
        while sum(map(len, received.values())) < 2 * lines:
            match = re.match(rb"(member-\d): line (\d+)\r\n", member.received)
            if match is None:
                assert b"\r\n" not in member.received, member.received[:100]
                member.received += member.socket.recv(1 << 16)
                continue
            member.received = member.received[match.end() :]
            received.setdefault(match[1].decode(), []).append(int(match[2]))
        assert received == {"member-0": list(range(lines)), "member-1": list(range(lines))}
    assert running.stop() == 0
