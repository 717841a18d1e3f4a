"""Clients of a cluster behind a load balancer: short connections at a steady rate, and long ones that reconnect.

Its argument is a JSON object of arguments for `Clients`. It answers each line on standard input with the counts so far,
as JSON; when standard input is closed, every client finishes, and the final counts are printed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections import Counter
from typing import Any, Protocol

GREETING = b"Hello from the server!"

# Members of a room of the chat. The first one speaks.
ROOM_SIZE = 20


class Talk(Protocol):
    """What clients and the service say in a connection. Both raise EOFError if the service closes it."""

    async def short(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Talk on a short connection, up to the end of the service's output."""

    async def long(self, client: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Talk on a long connection, until the clients stop."""


class WrongAnswer(Exception):  # noqa: N818  # it is no error of this program
    """The service has answered something wrong."""


class Echo:
    """Talks with the protocol echo. A long connection exchanges a numbered message every `pace` seconds."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients

    async def short(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received = await reader.readexactly(len(GREETING))
        message = b"%d\n" % number
        writer.write(message)
        writer.write_eof()
        received += await reader.read(-1)
        if received != GREETING + message:
            raise WrongAnswer(received)

    async def long(self, client: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(len(GREETING))
        number = 0
        while not self._clients.stopping.is_set():
            message = b"%d\n" % number
            writer.write(message)
            if await reader.readexactly(len(message)) != message:
                raise WrongAnswer
            self._clients.exchanges += 1
            number += 1
            await self._clients.pause(self._clients.pace)


class Chat:
    """Talks with the protocol chat. Long connections are members of rooms; the first one of a room sends numbers.

    A member checks the numbers that it receives: they increase, and none is missing between two of them, unless the
    service has reported that lines may be missing, or the speaker has not received the number either: that is when the
    connection of the speaker ended before its line was accepted.
    """

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self._next: Counter[int] = Counter()  # the number that a speaker sends next
        self._accepted: dict[int, set[int]] = {}
        self._holes: list[tuple[int, int, int]] = []  # client, first and last missing number

    async def short(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"short%d\r\n/quit\r\n" % number)
        lines = (await reader.read(-1)).decode().splitlines()
        if "* the chat shuts down" in lines:
            self._clients.notified += 1
        elif not any(line.startswith(f"* hello short{number};") for line in lines) or lines[-1] != "* goodbye":
            raise WrongAnswer(lines)

    async def long(self, client: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = self._lines(reader)
        name = f"member{client}"
        writer.write(f"{name}\r\n".encode())
        async for line in lines:
            if line.startswith("* hello "):
                break
            if "taken" in line:  # the connection before this one may not have ended yet for the other node
                await self._clients.pause(self._clients.pace)
                writer.write(f"{name}\r\n".encode())
        room = client // ROOM_SIZE
        writer.write(f"/join room{room}\r\n".encode())
        speaking = None
        if client % ROOM_SIZE == 0:
            speaking = asyncio.create_task(self._speak(client, writer))
        try:
            await self._listen(client, lines)
        finally:
            self._clients.members.discard(name)
            if speaking is not None:
                speaking.cancel()

    async def _lines(self, reader: asyncio.StreamReader) -> Any:
        """Yield lines until the clients stop. Raises EOFError at the end of the connection."""
        while not self._clients.stopping.is_set():
            line = await reader.readline()
            if not line.endswith(b"\n"):
                raise EOFError
            yield line.decode().rstrip("\r\n")

    async def _speak(self, client: int, writer: asyncio.StreamWriter) -> None:
        while not self._clients.stopping.is_set():
            writer.write(b"number %d\r\n" % self._next[client])
            self._next[client] += 1
            await self._clients.pause(self._clients.pace)

    async def _listen(self, client: int, lines: Any) -> None:
        speaker = client // ROOM_SIZE * ROOM_SIZE
        start, last, gap = f"member{speaker}: number ", -1, True
        accepted = self._accepted.setdefault(speaker, set())
        async for line in lines:
            if "lines may be missing" in line:
                self._clients.gaps += 1
                gap = True
            elif line.startswith(start):
                number = int(line.removeprefix(start))
                if number <= last:
                    raise WrongAnswer(f"member{client}: {number} after {last}")
                if number > last + 1 and not gap:
                    self._holes.append((speaker, last + 1, number - 1))
                last, gap = number, False
                if client == speaker:
                    accepted.add(number)
                self._clients.exchanges += 1
            elif line == f"* member{client} has joined room{client // ROOM_SIZE}":
                self._clients.members.add(f"member{client}")
            elif not line.startswith("* "):
                self._clients.heard[line] += 1

    def lost(self) -> int:
        """Return how many accepted numbers are missing without a notice."""
        return sum(len(self._accepted[speaker] & {*range(first, last + 1)}) for speaker, first, last in self._holes)


class Clients:
    """`rate` short connections each second, and `long` clients that open a connection again when it has ended.

    `talk` is "echo" or "chat". `pace` is the time between two messages of a long client, in seconds. A connection fails
    after `patience` seconds without an answer.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        talk: str = "echo",
        rate: int = 0,
        long: int = 0,
        pace: float = 0.25,
        patience: float = 30.0,
    ) -> None:
        self._address = host, port
        self._talk: Any = {"echo": Echo, "chat": Chat}[talk](self)
        self._rate = rate
        self._long = long
        self._patience = patience
        self.pace = pace
        self.stopping = asyncio.Event()
        self.ok = self.notified = self.exchanges = self.connected = self.gaps = 0
        self.slowest = 0.0
        self.failed: list[str] = []
        self.ended: Counter[str] = Counter()
        self.heard: Counter[str] = Counter()
        self.members: set[str] = set()

    async def run(self) -> None:
        long = [asyncio.create_task(self._long_client(client)) for client in range(self._long)]
        await self._short_connections()
        # A member of the chat may wait for a line.
        for task in long:
            task.cancel()
        await asyncio.gather(*long, return_exceptions=True)

    def report(self) -> dict[str, Any]:
        """Return the counts.

        Of short connections: those that ended `ok`, of which `notified` ones were closed with a notice of the service;
        for each `failed` one the reason; and the duration of the `slowest` one in seconds. Of long ones: how many are
        `connected`, their `exchanges`, and how those `ended` that the client has not closed: with `fin`, `reset`, or
        another problem. Of a chat: `lost` lines, `gaps` that were reported, how many clients are `members` of their
        room, and other lines that were `heard`.
        """
        return {
            "ok": self.ok,
            "notified": self.notified,
            "failed": self.failed,
            "slowest": self.slowest,
            "connected": self.connected,
            "exchanges": self.exchanges,
            "ended": self.ended,
            "lost": self._talk.lost() if isinstance(self._talk, Chat) else 0,
            "gaps": self.gaps,
            "members": len(self.members),
            "heard": self.heard,
        }

    async def pause(self, seconds: float) -> None:
        """Wait for so many seconds, or until the clients stop."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), seconds)

    async def _short_connections(self) -> None:
        began = time.monotonic()
        async with asyncio.TaskGroup() as connections:
            number = 0
            while not self.stopping.is_set():
                # After a delay of this process, the missing connections follow at once: the average rate is kept.
                while number < (time.monotonic() - began) * self._rate:
                    number += 1
                    connections.create_task(self._short_connection(number))
                await self.pause(1 / (self._rate or 1))

    async def _short_connection(self, number: int) -> None:
        began = time.monotonic()
        writer = None
        try:
            async with asyncio.timeout(self._patience):
                reader, writer = await asyncio.open_connection(*self._address)
                await self._talk.short(number, reader, writer)
        except (OSError, EOFError, TimeoutError, WrongAnswer) as error:
            self.failed.append(f"{error!r} after {time.monotonic() - began:.3f} s")
        else:
            self.ok += 1
            self.slowest = max(self.slowest, time.monotonic() - began)
        finally:
            await self._close(writer)

    async def _long_client(self, client: int) -> None:
        while not self.stopping.is_set():
            writer = None
            try:
                async with asyncio.timeout(self._patience):
                    reader, writer = await asyncio.open_connection(*self._address)
                self.connected += 1
                try:
                    await self._talk.long(client, reader, writer)
                finally:
                    self.connected -= 1
            except (EOFError, BrokenPipeError):
                self.ended["fin"] += 1  # a write after the peer's FIN and RST raises BrokenPipeError
            except ConnectionResetError:
                self.ended["reset"] += 1
            except (OSError, TimeoutError, WrongAnswer) as error:
                self.ended[repr(error)] += 1
            finally:
                await self._close(writer)

    async def _close(self, writer: asyncio.StreamWriter | None) -> None:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def _main() -> None:
    clients = Clients(**json.loads(sys.argv[1]))
    commands = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    running = asyncio.create_task(clients.run())
    while await commands.readline():
        print(json.dumps(clients.report()), flush=True)
    clients.stopping.set()
    await running
    print(json.dumps(clients.report()), flush=True)


if __name__ == "__main__":
    asyncio.run(_main())
