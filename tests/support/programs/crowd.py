"""A program with many members of one chat room, all of which read, and some of which attack the others.

Arguments: the port and the number of members. It joins all members to the room `den`, prints `ready`, and reads attacks
from standard input, one JSON object per line. For each it prints a JSON object once everything is sent:

- `{"send": TEXT, "times": N, "senders": K}`: K members send TEXT N times each, as fast as the server accepts it;
- `{"leave": K}`: K members reset their connections simultaneously;
- `{"come and go": N}`: N successive connections join and are reset.

The result has the number of members that the server disconnected (`cut`) since the start, and of bytes `received`.
"""

from __future__ import annotations

import json
import selectors
import socket
import struct
import sys
from typing import Any

_RESET = struct.pack("ii", 1, 0)  # struct linger of socket(7)


class Crowd:
    """The members of the room `den`."""

    def __init__(self, port: int, members: int) -> None:
        self._port = port
        self._selector = selectors.DefaultSelector()
        self._unsent: dict[socket.socket, memoryview] = {}
        self._buffer = bytearray(1 << 20)
        self.cut = self.received = 0
        self._members = [self._join(f"member{number}") for number in range(members)]
        # When the last member sees its own join, every member is in the room.
        last = b"* last has joined den\r\n"
        probe = self._join("last")
        received = b""
        while last not in received:
            self._step()
            probe.setblocking(True)
            received += probe.recv(1 << 16)
            probe.setblocking(False)

    def _join(self, nick: str) -> socket.socket:
        member = socket.create_connection(("127.0.0.1", self._port), timeout=60)
        member.sendall(f"{nick}\n/join den\n".encode())
        member.setblocking(False)
        self._selector.register(member, selectors.EVENT_READ)
        self._step(0)
        return member

    def _step(self, seconds: float = 0.05) -> None:
        for key, events in self._selector.select(seconds):
            member: Any = key.fileobj
            try:
                if events & selectors.EVENT_WRITE:
                    self._send(member)
                if events & selectors.EVENT_READ:
                    count = member.recv_into(self._buffer)
                    self.received += count
                    if not count:
                        raise ConnectionResetError
            except BlockingIOError:
                pass
            except ConnectionError:
                self.cut += 1
                self._unsent.pop(member, None)
                self._selector.unregister(member)

    def _send(self, member: socket.socket) -> None:
        unsent = self._unsent[member]
        unsent = unsent[member.send(unsent[: 1 << 18]) :]
        if unsent:
            self._unsent[member] = unsent
        else:
            del self._unsent[member]
            self._selector.modify(member, selectors.EVENT_READ)

    def _reset(self, member: socket.socket) -> None:
        if member in self._selector.get_map():
            self._selector.unregister(member)
        member.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        member.close()

    def attack(self, what: dict[str, Any]) -> dict[str, int]:
        if "send" in what:
            data = memoryview(what["send"].encode() * what["times"])  # shared by all
            for member in self._members[: what["senders"]]:
                self._unsent[member] = data
                self._selector.modify(member, selectors.EVENT_READ | selectors.EVENT_WRITE)
            while self._unsent:
                self._step()
        elif "leave" in what:
            for _ in range(what["leave"]):
                self._reset(self._members.pop())
        else:
            for number in range(what["come and go"]):
                self._reset(self._join(f"guest{number}"))
        return {"cut": self.cut, "received": self.received}

    def run(self) -> None:
        """Execute attacks until standard input is closed."""
        self._selector.register(sys.stdin, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            if any(key.fileobj is sys.stdin for key, _ in self._selector.select()):
                line = sys.stdin.readline()
                if not line:
                    return
                self._selector.unregister(sys.stdin)
                print(json.dumps(self.attack(json.loads(line))), flush=True)
                self._selector.register(sys.stdin, selectors.EVENT_READ)
                continue
            self._selector.unregister(sys.stdin)
            self._step(0)
            self._selector.register(sys.stdin, selectors.EVENT_READ)


if __name__ == "__main__":
    Crowd(int(sys.argv[1]), int(sys.argv[2])).run()
